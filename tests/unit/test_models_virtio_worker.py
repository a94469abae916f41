"""``Worker``: no kick is lost, nobody works twice at once, and nothing goes on after stop."""

from __future__ import annotations

import threading
import time

import pytest

from vfiomig.models.virtio_worker import Worker

DEADLINE = 10.0


def test_a_kick_does_short_work_at_once_in_its_own_thread() -> None:
    done: list[tuple[bool, str]] = []

    def work(may_wait: bool) -> bool:
        done.append((may_wait, threading.current_thread().name))
        return False

    worker = Worker("w", work)
    worker.start()
    worker.kick()
    assert done == [(False, threading.current_thread().name)]
    assert "w" not in [thread.name for thread in threading.enumerate()]
    worker.stop()


def test_what_is_left_is_done_by_the_thread() -> None:
    finished = threading.Event()

    def work(may_wait: bool) -> bool:
        if may_wait:
            assert threading.current_thread().name == "w"
            finished.set()
        return not may_wait

    worker = Worker("w", work)
    worker.start()
    worker.kick()
    assert finished.wait(DEADLINE)
    worker.stop()
    assert "w" not in [thread.name for thread in threading.enumerate()]


def test_it_stops_and_starts_again_after_no_thread_could_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finished = threading.Event()

    def work(may_wait: bool) -> bool:
        if may_wait:
            finished.set()
        return not may_wait

    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    worker = Worker("w", work)
    worker.start()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            worker.kick()
    worker.stop()
    worker.start()
    worker.kick()
    assert finished.wait(DEADLINE)
    worker.stop()


def test_a_kick_never_waits_and_is_not_lost() -> None:
    entered, go_on = threading.Event(), threading.Event()
    todo, done = [1], []

    def work(may_wait: bool) -> bool:
        if not may_wait:
            return True
        while todo:
            done.append(todo.pop())
            entered.set()
            assert go_on.wait(DEADLINE)
        return False

    worker = Worker("w", work)
    worker.start()
    worker.kick()
    assert entered.wait(DEADLINE)
    todo.append(2)
    worker.kick()
    assert done == [1], "the thread is held still"
    go_on.set()
    deadline = time.monotonic() + DEADLINE
    while len(done) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    worker.stop()


def test_stop_waits_for_whoever_works_and_ends_the_work() -> None:
    entered, go_on = threading.Event(), threading.Event()
    log: list[str] = []

    def work(_may_wait: bool) -> bool:
        if not worker.running:
            return False
        entered.set()
        assert go_on.wait(DEADLINE)
        log.append("worked")
        return True

    worker = Worker("w", work)
    worker.start()
    kicking = threading.Thread(target=worker.kick)
    kicking.start()
    assert entered.wait(DEADLINE)

    def stop() -> None:
        worker.stop()
        log.append("stopped")

    stopping = threading.Thread(target=stop)
    stopping.start()
    time.sleep(0.02)
    assert log == []
    go_on.set()
    stopping.join(DEADLINE)
    kicking.join(DEADLINE)
    assert log == ["worked", "stopped"]
    worker.wake()
    worker.kick()
    assert log == ["worked", "stopped"]


def test_many_kickers_never_work_at_once_and_lose_nothing() -> None:
    lock, counter = threading.Lock(), threading.Lock()
    offered = taken = 0

    def work(may_wait: bool) -> bool:
        nonlocal taken
        assert lock.acquire(blocking=False), "two at once"
        try:
            while True:
                with counter:
                    if taken == offered:
                        return False
                    taken += 1
                if not may_wait:
                    return True
        finally:
            lock.release()

    worker = Worker("w", work)
    worker.start()

    def kicker() -> None:
        nonlocal offered
        for _ in range(500):
            with counter:
                offered += 1
            worker.kick()

    threads = [threading.Thread(target=kicker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    deadline = time.monotonic() + DEADLINE
    while taken < offered:
        assert time.monotonic() < deadline, f"{taken} of {offered}"
        time.sleep(0.001)
    worker.stop()
    assert offered == 2000


def test_start_after_stop_works_again() -> None:
    finished = threading.Event()

    def work(may_wait: bool) -> bool:
        if may_wait:
            finished.set()
        return False

    worker = Worker("w", work)
    for _ in range(3):
        worker.start()
        worker.wake()
        assert finished.wait(DEADLINE)
        worker.stop()
        finished.clear()
