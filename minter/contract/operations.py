"""Operations that a client may request on a file, as the contract names them."""

from typing import Literal, get_args

Operation = Literal[
    "read",  # download, or be the source of a copy
    "write",  # upload or receive a new file
    "overwrite",  # upload or receive over an existing file
    "retry",  # clean up after a failed copy and try again: FTS deletes the destination
    "delete",
    "stat",
    "make_parents",
    "stage",  # bring a nearline file online
    "poll",  # ask where a file is: nearline, online, archived
]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
