"""The OpenAPI document: every operation has a name, a tag, and an example that its schema allows."""

from typing import Any

import jsonschema

from minter.issuer.openapi import document

TOLD = document("https://tokens.example.org/vo/")
OPERATIONS: list[dict[str, Any]] = [o for methods in TOLD["paths"].values() for o in methods.values()]


def test_operations_have_names_and_tags() -> None:
    names = [operation["operationId"] for operation in OPERATIONS]
    assert len(names) == len(set(names)) == 11
    assert {tag for operation in OPERATIONS for tag in operation["tags"]} == {t["name"] for t in TOLD["tags"]}


def test_examples_are_valid() -> None:
    for operation in OPERATIONS:
        for content in operation.get("requestBody", {}).get("content", {}).values():
            schema = {**content["schema"], "components": TOLD["components"]}
            jsonschema.Draft202012Validator(schema).validate(content["example"])
