"""Every way in which the client fails has a sentence."""

from __future__ import annotations

import errno
import inspect
import json

import httpx2
import pytest
from huggingface_hub import errors

from dora_convert.errors import HubError, InputError, OutputError
from dora_convert.hub.faults import is_passing, translated
from dora_convert.hub.refs import Ref

REF = Ref("org/name", "v1")
SECRET = "hf_canarySECRET"


def said(error: Exception, *, has_token: bool = False) -> Exception | None:
    return translated(error, REF, has_token=has_token, endpoint="https://hub.example")


def response(status: int) -> httpx2.Response:
    headers = {"Authorization": f"Bearer {SECRET}"}
    request = httpx2.Request("GET", "https://hub.example/x", headers=headers)
    return httpx2.Response(status, request=request, text=SECRET)


def subclasses(kind: type[Exception], module: object) -> list[type[Exception]]:
    found = [cls for _, cls in inspect.getmembers(module, inspect.isclass)]
    return [cls for cls in found if issubclass(cls, kind)]


ANSWERED = subclasses(errors.HfHubHTTPError, errors)


@pytest.mark.parametrize("kind", ANSWERED, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("has_token", [False, True])
def test_refusals(kind: type[Exception], has_token: bool) -> None:
    error = kind.__new__(kind)
    Exception.__init__(error, SECRET)
    error.response = response(403)  # type: ignore[attr-defined]
    found = said(error, has_token=has_token)
    assert isinstance(found, HubError)
    for text in (found.what, found.hint, *found.where):
        assert SECRET not in text
        assert "{" not in text
    assert "org/name" in f"{found.what} {found.where}"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 412, 413, 429, 500, 502, 503, 504])
def test_statuses(status: int) -> None:
    error = errors.HfHubHTTPError(SECRET, response=response(status))
    found = said(error)
    assert isinstance(found, HubError)
    assert SECRET not in f"{found.what}{found.hint}"
    assert is_passing(error) == (status >= 500)
    wrapped = RuntimeError("while uploading")
    wrapped.__cause__ = error
    assert str(said(wrapped)) == str(found)


@pytest.mark.parametrize(
    "kind", subclasses(httpx2.TransportError, httpx2), ids=lambda kind: kind.__name__
)
def test_broken_lines(kind: type[Exception]) -> None:
    found = said(kind(SECRET))
    assert isinstance(found, HubError)
    assert str(found) == "the Hub cannot be reached, or broke off"


def test_others() -> None:
    assert isinstance(said(errors.LocalEntryNotFoundError("x")), HubError)
    assert "HF_HUB_OFFLINE forbids" in str(said(errors.OfflineModeIsEnabled("x")))
    assert isinstance(said(errors.RevisionResolutionError("x")), HubError)
    assert isinstance(said(OSError(errno.ENOSPC, "full")), OutputError)
    assert "did not arrive whole" in str(said(OSError("Consistency check failed")))
    assert isinstance(said(errors.HFValidationError("x")), InputError)
    assert isinstance(said(ValueError("Invalid metadata in README.md.")), InputError)
    assert isinstance(said(json.JSONDecodeError("x", "<html>", 0)), HubError)


def test_what_is_not_about_the_hub() -> None:
    for error in (PermissionError(errno.EACCES, "x"), ValueError("x"), KeyError("x")):
        assert said(error) is None
