"""What operators may call things. Every text here ends up in the store, in logs and in ledgers, so it is plain."""

import re

MAX_REASON_CHARACTERS = 200

_ACCOUNT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_OPERATION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
#: How much of a refused text an error message repeats.
_SHOWN_CHARACTERS = 80


def check_account_name(name: str) -> str:
    """The name itself. Raises ValueError unless it is 1…64 letters, digits or ``._@-``, a letter or digit first."""
    if not _ACCOUNT.fullmatch(name):
        raise ValueError(
            f"{name[:_SHOWN_CHARACTERS]!r} is not an account name: 1 to 64 letters, digits or . _ @ -, "
            "beginning with a letter or digit"
        )
    return name


def check_operation_id(operation: str) -> str:
    """The id itself. Raises ValueError unless it is 1…128 letters, digits or ``._:-``."""
    if not _OPERATION_ID.fullmatch(operation):
        raise ValueError(
            f"{operation[:_SHOWN_CHARACTERS]!r} is not an operation id: 1 to 128 letters, digits or . _ : -"
        )
    return operation


def check_reason(reason: str) -> str:
    """The reason itself, which may be empty. Raises ValueError for one of more than MAX_REASON_CHARACTERS or with
    control characters, a line break among them."""
    if len(reason) > MAX_REASON_CHARACTERS:
        raise ValueError(f"a reason has at most {MAX_REASON_CHARACTERS} characters; this one has {len(reason)}")
    if not reason.isprintable():
        raise ValueError("a reason is one line of text without control characters")
    return reason
