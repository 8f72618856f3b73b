"""What the user is told where a call refuses."""

from collections.abc import Callable

import pytest

from engine.program.errors import UserError


def refusal(call: Callable, *arguments, **options) -> str:
    """The message of the UserError that `call` ends with, checked to be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)
