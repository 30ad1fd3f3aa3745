"""A failed measurement says why where its result would be; what is old is never the reason."""

import pytest

from dynatree.devices import DeviceError
from dynatree.failures import failure_path, failure_reason, recording


def fail(result, error, spec="a"):
    with pytest.raises(type(error)), recording(result, spec):
        raise error


def test_the_reason_of_the_last_failure_is_kept_until_a_success(tmp_path):
    result = tmp_path / "runs" / "tree.json"
    assert failure_reason(result, "a") is None
    fail(result, DeviceError("needs 2 GiB,\n  1 GiB is free"))
    assert failure_path(result).name == "tree.failed.json"
    assert failure_reason(result, "a") == "needs 2 GiB, 1 GiB is free"
    assert failure_reason(result, "b") is None
    fail(result, ValueError())
    assert failure_reason(result, "a") == "ValueError"
    with recording(result, "a"):
        result.write_text("{}")
    assert not failure_path(result).exists()


def test_an_interruption_is_no_failure(tmp_path):
    fail(tmp_path / "tree.json", KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_cannot_be_written_or_read_hides_nothing(tmp_path):
    (tmp_path / "runs").touch()
    fail(tmp_path / "runs" / "tree.json", DeviceError("no memory"))
    failure_path(tmp_path / "tree.json").write_text("{")
    assert failure_reason(tmp_path / "tree.json", "a") is None
