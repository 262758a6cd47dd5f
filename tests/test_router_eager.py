"""Coroutines that run at once and become tasks only if they wait: nothing of them is lost on the way."""

import asyncio

import pytest

from kvd.router.proxy import eager


def test_what_does_not_wait_is_done_at_once() -> None:
    done: list[str] = []

    async def course() -> None:
        done.append("done")

    async def main() -> None:
        assert eager.start(course(), asyncio.get_running_loop(), "a") is None
        assert done == ["done"]

    asyncio.run(main())


@pytest.mark.parametrize("turns", [0, 1], ids=["at its first step", "later"])
def test_what_waits_goes_on_with_what_it_waited_for(turns: int) -> None:
    async def main() -> None:
        first, second = asyncio.Future[str](), asyncio.Future[str]()
        got: list[str] = []

        async def course() -> None:
            got.append(await first)
            await asyncio.sleep(0)
            got.append(await second)

        task = eager.start(course(), asyncio.get_running_loop(), "a")
        assert task is not None
        for _ in range(turns):
            await asyncio.sleep(0)
        first.set_result("first")
        second.set_result("second")
        await task
        assert got == ["first", "second"]

    asyncio.run(main())


@pytest.mark.parametrize("turns", [0, 1, 2], ids=["before its first step", "in its first wait", "in its second"])
def test_what_is_cancelled_is_told(turns: int) -> None:
    async def main() -> None:
        told: list[str] = []

        async def course() -> None:
            try:
                if turns == 2:
                    await asyncio.sleep(0)
                await asyncio.Future[None]()
            except asyncio.CancelledError:
                told.append("cancelled")
                raise

        task = eager.start(course(), asyncio.get_running_loop(), "a")
        assert task is not None
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert told == ["cancelled"]

    asyncio.run(main())


def test_a_failure_is_raised_where_it_happens() -> None:
    async def course(wait: bool) -> None:
        if wait:
            await asyncio.sleep(0)
        raise ValueError("wrong")

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(ValueError, match="wrong"):
            eager.start(course(False), loop, "a")
        task = eager.start(course(True), loop, "a")
        assert task is not None
        with pytest.raises(ValueError, match="wrong"):
            await task

    asyncio.run(main())


def test_after_its_first_wait_deadlines_work() -> None:
    async def main() -> None:
        late: list[str] = []

        async def course() -> None:
            await asyncio.sleep(0)
            try:
                async with asyncio.timeout(0.001):
                    await asyncio.Future[None]()
            except TimeoutError:
                late.append("late")

        task = eager.start(course(), asyncio.get_running_loop(), "a")
        assert task is not None
        await task
        assert late == ["late"]

    asyncio.run(main())
