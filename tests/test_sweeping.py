"""The sweep: killed at any moment, in threads, processes and on Dask, only work in hand is lost."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from fxbasis.errors import FxBasisError, InputError, UsageError
from fxbasis.sweeping import sweep

FORK = multiprocessing.get_context("fork")  # the others import torch in each process
Result = dict[str, float]


def root(number: int) -> Result:
    return {"root": math.sqrt(number), "third": number / 3}


def logged(started: Path, seconds: float, number: int) -> Result:
    """The root, after a note that it was begun and some time."""
    with started.open("a") as file:
        file.write(f"{number}\n")
    time.sleep(seconds)
    return root(number)


def points_of(count: int) -> dict[str, int]:
    return {f"point {number}": number for number in range(count)}


def begun(started: Path) -> Counter[str]:
    return Counter(f"point {line}" for line in started.read_text().split()) if started.exists() else Counter()


def finished(path: Path) -> list[str]:
    """The keys of the whole lines, none twice in a context."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    entries = [json.loads(line) for line in lines]
    assert len({(entry["context"], entry["key"]) for entry in entries}) == len(entries)
    return [entry["key"] for entry in entries]


def start(work: Callable[[], object]) -> multiprocessing.process.BaseProcess:
    """A process of its own group that does the work."""

    def run() -> None:
        os.setpgid(0, 0)
        work()

    process = FORK.Process(target=run)
    process.start()
    return process


def kill(process: multiprocessing.process.BaseProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


@pytest.fixture(params=["here", "threads", "processes"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor | None]:
    if request.param == "here":
        yield None
    elif request.param == "threads":
        with ThreadPoolExecutor(3) as threads:
            yield threads
    else:
        with ProcessPoolExecutor(2, mp_context=FORK) as processes:
            yield processes


def test_results_in_order_resumed_and_of_their_context(executor: Executor | None, tmp_path: Path) -> None:
    points, path, started = points_of(200), tmp_path / "results.jsonl", tmp_path / "started"
    compute = partial(logged, started, 0.0)
    first = sweep(dict(list(points.items())[50:100]), compute, path=path, context="a", executor=executor)
    assert len(begun(started)) == 50
    found = sweep(points, compute, path=path, context="a", executor=executor)
    assert found == {key: root(number) for key, number in points.items()}
    assert list(found) == list(points)
    assert {key: found[key] for key in first} == first
    assert set(begun(started).values()) == {1}
    again = sweep(points, compute, path=path, context="a")
    assert (again, begun(started).total()) == (found, 200)
    other = sweep({"point 3": 4}, root, path=path, context="b", executor=executor)
    assert other == {"point 3": root(4)}
    assert sweep({"point 3": 3}, compute, path=path, context="a") == {"point 3": root(3)}
    assert begun(started).total() == 200


def test_without_a_file(executor: Executor | None) -> None:
    assert sweep(points_of(9), root, path=None, context="", executor=executor) == {
        key: root(number) for key, number in points_of(9).items()
    }
    assert sweep({}, root, path=None, context="", executor=executor) == {}


def test_killed_at_twenty_moments(tmp_path: Path) -> None:
    points, path, started = points_of(250), tmp_path / "results.jsonl", tmp_path / "started"
    work = partial(sweep, points, partial(logged, started, 0.01), path=path, context="c")
    moments, repeated = random.Random(0), 0
    for _ in range(20):
        before, done = begun(started), finished(path)
        process = start(work)
        while begun(started) == before:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.1))
        kill(process)
        assert process.exitcode == -signal.SIGKILL
        again = begun(started) - before
        assert not set(again) & set(done)  # nothing finished is redone
        assert len(set(again) - set(finished(path))) <= 1  # and one point lost
        repeated += len(set(again) & set(before))
    assert 0 < len(finished(path)) < 250
    found = work()
    assert found == sweep(points, root, path=None, context="")
    assert list(found) == list(points)
    assert begun(started).total() <= 250 + 20
    assert repeated <= 20
    assert sorted(finished(path)) == sorted(points)


def test_killed_with_its_pool_at_work(tmp_path: Path) -> None:
    """The workers outlive the sweep, and the file is free all the same.

    A point takes longer than a line takes to the disk, or those on their way back would be without number.
    """
    points, path, started = points_of(120), tmp_path / "results.jsonl", tmp_path / "started"

    def work() -> None:
        with ProcessPoolExecutor(2, mp_context=FORK) as pool:
            sweep(points, partial(logged, started, 0.05), path=path, context="", executor=pool)

    for _ in range(3):
        before = len(finished(path))
        process = start(work)
        try:
            while len(finished(path)) < before + 10:
                time.sleep(0.001)
        finally:
            kill(process)
        done, noted = set(finished(path)), begun(started)
        pool = process.pid
        sweep({"point 0": 0}, root, path=path, context="")
        os.killpg(pool or 0, signal.SIGKILL)
        assert len(set(noted) - done) <= 8  # at work, in the pool's queue, or on their way back
    with ProcessPoolExecutor(2, mp_context=FORK) as pool_here:
        found = sweep(points, root, path=path, context="", executor=pool_here)
    assert found == sweep(points, root, path=None, context="")


def test_a_line_cut_anywhere_is_written_anew(tmp_path: Path) -> None:
    path, points = tmp_path / "results.jsonl", points_of(3)
    found = sweep(points, root, path=path, context="x")
    whole = path.read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for length in range(last, len(whole)):
        path.write_bytes(whole[:length])
        assert sweep(points, root, path=path, context="x") == found
        assert path.read_bytes() == whole


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    values = {"a": 0.1 + 0.2, "b": math.inf, "c": 5e-324, "d": 3, "e": True}
    fresh = sweep({"é\n": values}, dict, path=path, context='"')
    assert sweep({"é\n": values}, dict, path=path, context='"') == fresh
    assert {name: type(value) for name, value in fresh["é\n"].items()} == dict.fromkeys(values, float)
    lost = sweep({"nan": 0}, lambda _: {"x": math.nan}, path=path, context="")
    assert math.isnan(lost["nan"]["x"])
    assert math.isnan(sweep({"nan": 0}, root, path=path, context="")["nan"]["x"])


def fragile(number: int) -> Result:
    if number % 40 == 7:
        raise ValueError(f"no root of {number}")
    return root(number)


def test_a_failed_point_is_named_once_the_others_are_kept(executor: Executor | None, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    message = (
        r"point 'point \d+' failed \(and 4 more\): ValueError: no root of \d+; mend it and sweep again: "
    )
    with pytest.raises(FxBasisError, match=message + f"those that finished are in {path}") as failure:
        sweep(points_of(200), fragile, path=path, context="", executor=executor)
    assert isinstance(failure.value.__cause__, ValueError)
    assert len(finished(path)) == 195
    message = (
        r"point 'point 7' failed: ValueError: no root of 7; mend it and sweep again: give a path= to keep"
    )
    with pytest.raises(FxBasisError, match=message):
        sweep(points_of(9), fragile, path=None, context="", executor=executor)


def test_a_result_of_another_kind_is_a_failure() -> None:
    message = r"point 'a' failed: InputError: the result is a float; return a dict of floats; mend it"
    with pytest.raises(FxBasisError, match=message):
        sweep({"a": 4.0}, math.sqrt, path=None, context="")  # type: ignore[arg-type]


def deadly(number: int) -> Result:
    if number == 30:
        os.kill(os.getpid(), signal.SIGKILL)
    return root(number)


def test_a_lost_worker_breaks_a_pool_and_the_next_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    message = (
        r"failed( \(and \d+ more\))?: BrokenProcessPool: .*; pass a new executor and sweep again: those that"
    )
    with ProcessPoolExecutor(2, mp_context=FORK) as pool, pytest.raises(FxBasisError, match=message):
        sweep(points_of(300), deadly, path=path, context="", executor=pool)
    kept = finished(path)
    assert "point 30" not in kept
    with ProcessPoolExecutor(2, mp_context=FORK) as pool:
        found = sweep(points_of(300), root, path=path, context="", executor=pool)
    assert finished(path)[: len(kept)] == kept
    assert list(found.items()) == [(key, root(number)) for key, number in points_of(300).items()]


def test_minutes_stop_the_sweep(executor: Executor | None, tmp_path: Path) -> None:
    points, path, started = points_of(300), tmp_path / "results.jsonl", tmp_path / "started"
    compute, seconds = partial(logged, started, 0.02), 0.5
    before = time.monotonic()
    found = sweep(points, compute, path=path, context="", executor=executor, minutes=seconds / 60)
    assert seconds <= time.monotonic() - before < seconds + 2
    assert 1 < len(found) < 300
    assert set(found) == set(finished(path)) == set(begun(started))  # what was begun was waited for
    assert list(found) == sorted(found, key=list(points).index)
    assert sweep(points, compute, path=path, context="", executor=executor, minutes=0) == found
    assert begun(started).total() == len(found)


class Hoarder(ThreadPoolExecutor):
    """Counts the points that are submitted and not finished."""

    most = 0

    def submit(self, *arguments, **keywords):  # type: ignore[no-untyped-def]
        future: Future[object] = super().submit(*arguments, **keywords)
        self.most = max(self.most, self._work_queue.qsize())
        return future


def test_few_points_are_submitted_at_a_time() -> None:
    with Hoarder(1) as executor:
        sweep(points_of(1000), root, path=None, context="", executor=executor)
    assert 1 < executor.most <= 128


def test_an_interrupt_gives_up_what_has_not_begun(tmp_path: Path) -> None:
    started, points = tmp_path / "started", points_of(100)

    def interrupted(number: int) -> Result:
        if number == 3:
            raise KeyboardInterrupt
        return logged(started, 0.01, number)

    with ThreadPoolExecutor(1) as executor, pytest.raises(KeyboardInterrupt):
        sweep(points, interrupted, path=None, context="", executor=executor)
    assert len(begun(started)) < 50


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path, started = tmp_path / "results.jsonl", tmp_path / "started"
    process = start(partial(sweep, {"a": 4}, partial(logged, started, 60), path=path, context=""))
    try:
        while not begun(started):
            time.sleep(0.001)
        with pytest.raises(
            UsageError, match=r"results.jsonl is in use by another process; wait until its sweep"
        ):
            sweep({"b": 4}, root, path=path, context="")
    finally:
        kill(process)
    assert sweep({"b": 4}, root, path=path, context="") == {"b": root(4)}


@pytest.mark.parametrize(
    ("content", "which"),
    [
        ("hello\n", "line 1"),
        ('{"context": "", "key": "a", "result": {}}\n{"weights": 3}\n', "line 2"),
        ('["context"]\n', "line 1"),
        ('{"weights": [1, 2]}', "the last line"),
    ],
)
def test_another_file_is_left_alone(content: str, which: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(
        UsageError, match=rf"{which} of .*other.json is no result; delete it, or give another"
    ):
        sweep({"a": 4}, root, path=path, context="")
    assert path.read_text() == content


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot write .*none: No such file .*; give a path in a folder"):
        sweep({"a": 4}, root, path=tmp_path / "missing" / "none", context="")
    with pytest.raises(
        UsageError, match=r"cannot write .*: Is a directory; give a path in a folder that exists"
    ):
        sweep({"a": 4}, root, path=tmp_path, context="")
    with pytest.raises(InputError, match=r"the point 3 is named by a int; name it by a string"):
        sweep({3: 4}, root, path=None, context="")  # type: ignore[dict-item]


def test_a_full_disk_is_named_and_costs_one_point(tmp_path: Path) -> None:
    path, said = tmp_path / "results.jsonl", tmp_path / "said"

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # the last write is cut short
        try:
            sweep(points_of(100), root, path=path, context="")
        except UsageError as error:
            said.write_text(str(error))

    start(work).join()
    assert path.stat().st_size == 1000
    assert said.read_text().endswith(
        "No space left on device; give a path in a folder that exists and has room"
    )
    assert len(finished(path)) > 5
    assert len(sweep(points_of(100), root, path=path, context="")) == len(finished(path)) == 100


def test_a_lost_dask_worker_costs_the_points_it_worked_on(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="needs the extra fxbasis[distributed]")
    points, path, started = points_of(30), tmp_path / "results.jsonl", tmp_path / "started"

    def compute(number: int) -> Result:  # local, so that workers get its code and need not import torch
        with open(started, "a") as file:
            file.write(f"{number}\n")
        time.sleep(0.2)
        return {"root": math.sqrt(number), "third": number / 3}

    def kill_in_the_middle(worker: int) -> None:
        while len(finished(path)) < 10:
            time.sleep(0.01)
        os.kill(worker, signal.SIGKILL)

    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        workers = set(client.run(os.getpid).values())
        killer = threading.Thread(target=kill_in_the_middle, args=[min(workers)])
        killer.start()
        found = sweep(points, compute, path=path, context="", executor=client.get_executor())
        killer.join()
        client.wait_for_workers(2, timeout=60)
        assert workers - set(client.run(os.getpid).values()) == {min(workers)}
        total, executor = begun(started).total(), client.get_executor()
        before = time.monotonic()
        some = sweep(points, compute, path=path, context="b", executor=executor, minutes=1.5 / 60)
        assert time.monotonic() - before < 3.5
        assert sorted(finished(path)) == sorted([*points, *some])
    assert list(found.items()) == [(key, root(number)) for key, number in points.items()]
    assert 0 < len(some) < 30
    assert total <= 30 + 1 + 3  # at work, or on their way back
