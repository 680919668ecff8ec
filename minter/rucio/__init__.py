"""A policy package that gives an unmodified Rucio per-file tokens, by rucio.cfg alone.

    [policy]
    package = minter.rucio

    [minter]
    policy_package = atlas_rucio_policy_package   ; the VO's own package, which works on unchanged
    url = https://tokens.example.org/atlas/       ; url-<vo>, client-<vo>, secret_file-<vo> in multi-VO
    client = rucio-prod
    secret_file = /opt/rucio/etc/minter.secret
    ca = /etc/grid-security/certificates
    away = wait                                   ; or rucio, or x509: what is done while Minter is away

RSEs are switched one by one: `rucio rse attribute add <RSE> --option minter=True`. A file goes with tokens of
Minter if all its RSEs are switched; every other file goes as before.

Rucio imports the policy package in every daemon. Submodules that are not Minter's own (`permission`,
`schema`, and the modules of algorithms) are those of the VO's package. `minter.rucio.hooks` has what is
wrapped in Rucio, and on which versions; on others Rucio stays as it is, and the log says so.
"""

import sys

from minter.rucio import hooks, wrapped

_package = wrapped.package()

if _package is not None:
    if hasattr(_package, "SUPPORTED_VERSION"):
        SUPPORTED_VERSION = _package.SUPPORTED_VERSION
    if hasattr(_package, "get_algorithms"):
        get_algorithms = _package.get_algorithms
    sys.meta_path.append(wrapped.Submodules(__name__, _package.__name__))

hooks.install()
