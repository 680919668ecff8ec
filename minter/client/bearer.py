"""Bearer tokens as tools of WLCG leave them for each other (WLCG Bearer Token Discovery 1.0)."""

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from minter.errors import InvalidRequest

MAX_BYTES = 16_384
"""Longest token that is read, in bytes."""


def find_bearer_token(environ: Mapping[str, str] = os.environ) -> str:
    """Return the bearer token that the discovery finds, empty if it finds none.

    The places are $BEARER_TOKEN, the file $BEARER_TOKEN_FILE, $XDG_RUNTIME_DIR/bt_u$ID and /tmp/bt_u$ID; the
    first that holds anything but white space counts. Raises InvalidRequest for a file that cannot be
    read, and for one of the last two that belongs to somebody else, who may have put it there.
    """
    if token := environ.get("BEARER_TOKEN", "").strip():
        return token
    if name := environ.get("BEARER_TOKEN_FILE", ""):
        return _content(Path(name), own=False)
    return next((token for path in _usual_places(environ) if (token := _content(path, own=True))), "")


def _usual_places(environ: Mapping[str, str]) -> Iterator[Path]:
    name = f"bt_u{os.geteuid()}"
    if folder := environ.get("XDG_RUNTIME_DIR", ""):
        yield Path(folder) / name
    yield Path("/tmp") / name  # noqa: S108 - the specification names it


def _content(path: Path, *, own: bool) -> str:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if own and not (stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()):
                raise InvalidRequest(f"{path} is not your own file, so its token is not used; remove it")
            content = file.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                raise InvalidRequest(f"{path} has more than {MAX_BYTES} bytes, so it holds no token")
            return content.decode("ascii").strip()
    except FileNotFoundError:
        if own:
            return ""
        raise InvalidRequest(f"BEARER_TOKEN_FILE names {path}, which does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InvalidRequest(f"the token in {path} cannot be read: {why}") from None
