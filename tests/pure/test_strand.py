"""A strand: order, no overlap, no loss; by hammering, and by trying every interleaving of a few threads."""

from __future__ import annotations

import random
import sys
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from iocp_ctypes._strand import Strand

Task = Callable[[], None]


class Later:
    """An executor that runs what it was given when the test says so."""

    def __init__(self) -> None:
        self.tasks: deque[Task] = deque()

    def __call__(self, task: Task) -> None:
        self.tasks.append(task)

    def run_one(self) -> None:
        self.tasks.popleft()()

    def run_all(self) -> None:
        while self.tasks:
            self.run_one()


class Threads:
    """An executor of several threads."""

    def __init__(self, count: int) -> None:
        self._tasks: deque[Task] = deque()
        self._waiting = threading.Semaphore(0)
        self._ending = False
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def __call__(self, task: Task) -> None:
        self._tasks.append(task)
        self._waiting.release()

    def _run(self) -> None:
        while True:
            self._waiting.acquire()
            if self._ending and not self._tasks:
                self._waiting.release()
                return
            self._tasks.popleft()()

    def end(self) -> None:
        """Run what is left and end."""
        self._ending = True
        self._waiting.release()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def later() -> Later:
    return Later()


# -- one thread ------------------------------------------------------------------------------------------


def test_tasks_run_in_order_with_their_arguments(later: Later) -> None:
    strand, ran = Strand(later), []
    for number in range(5):
        strand.post(lambda *args: ran.append(args), number, "more")
    assert ran == [], "a task never runs inside post"
    later.run_all()
    assert ran == [(number, "more") for number in range(5)]


def test_post_inside_a_lock_of_the_poster_runs_nothing(later: Later) -> None:
    strand, lock = Strand(later), threading.Lock()
    with lock:
        strand.post(lock.acquire)  # would wait for ever here
    later.run_all()
    assert lock.locked()


def test_entering_excludes_everybody_until_leaving(later: Later) -> None:
    strand, ran = Strand(later), []
    assert strand.enter() is True
    assert strand.enter() is False
    strand.post(ran.append, 1)
    later.run_all()
    assert ran == [], "the runner has not left"
    strand.leave()
    later.run_all()
    assert ran == [1]
    assert strand.enter() is True
    strand.leave()
    assert not later.tasks, "leaving with nothing to do hands on nothing"


def test_who_leaves_may_run_once_what_was_posted_meanwhile(later: Later) -> None:
    strand, ran = Strand(later), []
    assert strand.enter()
    strand.leave_done()
    assert strand.enter(), "with nothing to do it is leaving"

    def last() -> None:
        ran.append("last")
        strand.post(ran.append, "one more")

    strand.post(last)
    assert ran == []
    strand.leave_done()
    assert ran == ["last"], "once"
    later.run_all()
    assert ran == ["last", "one more"]
    assert strand.enter()
    strand.leave()


def test_nobody_enters_before_tasks_that_wait(later: Later) -> None:
    strand, ran = Strand(later), []
    strand.post(ran.append, 1)
    assert strand.enter() is False
    later.run_all()
    assert strand.enter() is True
    assert ran == [1]


def test_a_task_that_posts_runs_on_afterwards_and_not_inside(later: Later) -> None:
    strand, ran = Strand(later), []

    def outer() -> None:
        strand.post(ran.append, "inner")
        ran.append("outer")

    strand.post(outer)
    strand.post(ran.append, "second")
    later.run_all()
    assert ran == ["outer", "second", "inner"]


def test_nobody_enters_while_a_task_runs(later: Later) -> None:
    strand, entered = Strand(later), []
    strand.post(lambda: entered.append(strand.enter()))
    later.run_all()
    assert entered == [False]


def test_one_strand_does_not_keep_a_thread_to_itself(later: Later) -> None:
    # Two strands whose tasks post themselves again share one thread: they are served in turn, and what waits
    # in the executor does not grow.
    ran: list[str] = []

    def forever(strand: Strand, name: str) -> None:
        ran.append(name)
        strand.post(forever, strand, name)

    for name in "ab":
        strand = Strand(later)
        strand.post(forever, strand, name)
    for _ in range(100):
        later.run_one()
        assert len(later.tasks) == 2
    assert "".join(ran) == "ab" * 50


def test_the_executor_has_one_callable_of_a_strand_at_most(later: Later) -> None:
    strand, ran = Strand(later), []
    for number in range(100):
        strand.post(ran.append, number)
    assert len(later.tasks) == 1
    later.run_all()
    assert strand.enter() is True
    for number in range(100):
        strand.post(ran.append, 100 + number)
    assert not later.tasks, "the runner hands on what came"
    strand.leave()
    assert len(later.tasks) == 1
    later.run_all()
    assert ran == list(range(200))


def test_a_runner_runs_what_was_there_when_it_began(later: Later) -> None:
    strand, ran = Strand(later), []

    def task(number: int) -> None:
        ran.append(number)
        strand.post(task, number + 10)

    for number in range(3):
        strand.post(task, number)
    later.run_one()
    assert ran == [0, 1, 2]


def test_a_task_that_raises_leaves_the_strand_usable(later: Later) -> None:
    # Tasks must not raise; where one does, it is its executor that hears of it, and the rest goes on.
    strand, ran = Strand(later), []

    def bad() -> None:
        raise ZeroDivisionError

    strand.post(bad)
    strand.post(ran.append, 2)
    with pytest.raises(ZeroDivisionError):
        later.run_one()
    later.run_all()
    assert ran == [2]
    assert strand.enter() is True


def test_who_is_the_runner(later: Later) -> None:
    strand = Strand(later)
    seen: list[bool] = []

    def look() -> None:
        thread = threading.Thread(target=lambda: seen.append(strand.runs_elsewhere()))
        thread.start()
        thread.join()
        seen.append(strand.runs_elsewhere())

    look()
    assert seen == [False, False], "nobody runs"
    strand.enter()
    look()
    assert seen[2:] == [True, False]
    strand.post(look)
    strand.leave()
    look()
    assert seen[4:] == [False, False], "handed over, and nobody runs yet"
    later.run_all()
    assert seen[6:] == [True, False]
    thread = threading.Thread(target=strand.enter)
    thread.start()
    thread.join()
    assert strand.runs_elsewhere()
    strand.go_on()
    assert not strand.runs_elsewhere()


# -- hammering ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_eight_threads_hammer_one_strand(threads: int) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    posters, each = 8, 400
    executor = Threads(threads)
    strand = Strand(executor)
    inside = threading.Lock()
    ran: list[tuple[int, int]] = []
    entered = overlaps = 0

    def task(poster: int, number: int) -> None:
        nonlocal overlaps
        alone = inside.acquire(False)
        ran.append((poster, number))
        if number % 50 == 0:
            strand.post(nested, poster, number)
        overlaps += not alone
        if alone:
            inside.release()

    def nested(poster: int, number: int) -> None:
        task(poster + 100, number * 2 + 1)

    def hammer(poster: int) -> None:
        nonlocal entered, overlaps
        choices = random.Random(seed + poster)
        for number in range(each):
            strand.post(task, poster, number)
            if choices.random() < 0.5 and strand.enter():
                alone = inside.acquire(False)
                overlaps += not alone
                entered += 1
                if alone:
                    inside.release()
                strand.leave()

    hammering = [threading.Thread(target=hammer, args=(poster,)) for poster in range(posters)]
    for thread in hammering:
        thread.start()
    for thread in hammering:
        thread.join()
    executor.end()
    assert overlaps == 0
    for poster in range(posters):
        assert [number for by, number in ran if by == poster] == list(range(each)), "lost or overtaken"
    assert len(ran) == posters * (each + each // 50)
    assert strand.enter() is True, "somebody did not leave"


# -- every interleaving of a few threads ------------------------------------------------------------------


class Schedule:
    """Runs actors one at a time; at each `step` the next one to go on is chosen, by a list of choices.

    Actors are threads, but only one of them is ever let run. What an actor does between two steps is atomic.
    """

    def __init__(self, choices: list[int], preemptions_max: int) -> None:
        self._choices = choices
        self._preemptions = preemptions_max
        self.options: list[int] = []  # how many actors could have gone on, at each choice made
        self.made: list[int] = []
        self._gates: dict[int, threading.Semaphore] = {}
        self._living: list[int] = []
        self._back = threading.Semaphore(0)
        self._me = threading.local()
        self.raised: list[BaseException] = []

    def actor(self, function: Task) -> None:
        """Add an actor; it begins when it is chosen."""
        number = len(self._gates)
        gate = self._gates[number] = threading.Semaphore(0)
        self._living.append(number)

        def run() -> None:
            self._me.number = number
            gate.acquire()
            try:
                function()
            except BaseException as exc:
                self.raised.append(exc)
            self._living.remove(number)
            self._back.release()

        threading.Thread(target=run, daemon=True).start()

    def step(self) -> None:
        """Let another actor go on, perhaps."""
        self._back.release()
        self._gates[self._me.number].acquire()

    def run(self) -> None:
        """Run all actors to their ends."""
        current = -1
        while self._living:
            # The current one first, then the others: choice 0 means no preemption.
            able = [n for n in self._living if n == current] + [n for n in self._living if n != current]
            may_switch = current not in self._living or self._preemptions > 0
            count = len(able) if may_switch else 1
            at = len(self.made)
            choice = self._choices[at] if at < len(self._choices) else 0
            self.options.append(count)
            self.made.append(choice)
            if choice and current in self._living:
                self._preemptions -= 1
            current = able[choice]
            self._gates[current].release()
            self._back.acquire()


class StepList(list[Any]):
    """A list that lets others go on before each of its operations."""

    step: Task

    def append(self, item: Any) -> None:
        self.step()
        super().append(item)

    def pop(self, index: Any = -1) -> Any:
        self.step()
        return super().pop(index)


class StepDeque(deque[Any]):
    """A deque that lets others go on before each of its operations."""

    step: Task

    def append(self, item: Any) -> None:
        self.step()
        super().append(item)

    def popleft(self) -> Any:
        self.step()
        return super().popleft()

    def __bool__(self) -> bool:
        self.step()
        return super().__len__() > 0

    def __len__(self) -> int:
        self.step()
        return super().__len__()


class Scene:
    """A strand on stepping parts, with what its tasks did."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.strand = Strand(schedule.actor)
        token = self.strand._token = StepList(self.strand._token)
        tasks = self.strand._tasks = StepDeque()
        token.step = tasks.step = schedule.step
        self.inside = 0
        self.ran: list[str] = []
        self.expected: set[str] = set()

    def body(self, name: str) -> None:
        """Be a task, or what is done between enter and leave: nobody else is inside meanwhile."""
        self.inside += 1
        assert self.inside == 1, f"{name} overlaps"
        self.schedule.step()
        self.ran.append(name)
        self.inside -= 1

    def post(self, name: str) -> None:
        self.expected.add(name)
        self.strand.post(self.body, name)

    def enter_or_post(self, name: str) -> None:
        """What `Lifetime._run` does."""
        self.expected.add(name)
        if self.strand.enter():
            self.body(name)
            self.strand.leave()
        else:
            self.strand.post(self.body, name)

    def post_nested(self, name: str) -> None:
        def outer() -> None:
            self.body(name)
            self.post(name + "-nested")

        self.expected.add(name)
        self.strand.post(outer)


def two_posters(scene: Scene) -> None:
    def first() -> None:
        scene.post("a1")
        scene.post("a2")

    scene.schedule.actor(first)
    scene.schedule.actor(lambda: scene.post("b1"))


def entering_against_posting(scene: Scene) -> None:
    def packets() -> None:
        scene.enter_or_post("a1")
        scene.enter_or_post("a2")

    scene.schedule.actor(packets)
    scene.schedule.actor(lambda: scene.post("b1"))


def entering_twice(scene: Scene) -> None:
    scene.schedule.actor(lambda: scene.enter_or_post("a1"))
    scene.schedule.actor(lambda: scene.enter_or_post("b1"))


def nested_posting(scene: Scene) -> None:
    scene.schedule.actor(lambda: scene.post_nested("a1"))
    scene.schedule.actor(lambda: scene.enter_or_post("b1"))


#: A switch between threads costs ten times as much under Wine, where one preemption has to do.
PREEMPTIONS_MAX = 1 if sys.platform == "win32" else 2


@pytest.mark.parametrize("setting", [two_posters, entering_against_posting, entering_twice, nested_posting])
def test_every_interleaving_of_few_preemptions(setting: Callable[[Scene], None]) -> None:
    choices: list[int] | None = []
    schedules = 0
    while choices is not None:
        schedule = Schedule(choices, PREEMPTIONS_MAX)
        scene = Scene(schedule)
        setting(scene)
        schedule.run()
        schedules += 1
        assert not schedule.raised, (schedule.raised, schedule.made)
        ran = scene.ran
        assert sorted(ran) == sorted(scene.expected), (ran, schedule.made)
        for actor in "abc":
            own = [name for name in ran if name[0] == actor]
            assert own == sorted(own), (ran, schedule.made)
        choices = next_choices(schedule)
    assert schedules > 10**PREEMPTIONS_MAX / 2, "the scene is too small to show anything"


def next_choices(schedule: Schedule) -> list[int] | None:
    """Return the next schedule in lexical order; None after the last."""
    made = schedule.made
    for at in reversed(range(len(made))):
        if made[at] + 1 < schedule.options[at]:
            return [*made[:at], made[at] + 1]
    return None


def test_the_exploration_finds_a_strand_that_forgets_to_look_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # The check checks: a runner that looks at the queue only before it lets go leaves a task behind.
    def leave(self: Strand) -> None:
        if self._tasks:
            self._execute(self._drain)
        else:
            self._token.append(True)

    monkeypatch.setattr(Strand, "leave", leave)
    choices: list[int] | None = []
    while choices is not None:
        schedule = Schedule(choices, preemptions_max=2)
        scene = Scene(schedule)
        entering_against_posting(scene)
        schedule.run()
        if sorted(scene.ran) != sorted(scene.expected):
            return
        choices = next_choices(schedule)
    pytest.fail("a lost task went unnoticed")


def test_the_exploration_finds_a_strand_without_exclusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Strand, "enter", lambda self: True)
    choices: list[int] | None = []
    while choices is not None:
        schedule = Schedule(choices, preemptions_max=2)
        scene = Scene(schedule)
        entering_twice(scene)
        schedule.run()
        if schedule.raised:
            return
        choices = next_choices(schedule)
    pytest.fail("an overlap went unnoticed")


def test_two_first_posts_at_once_make_one_queue() -> None:
    for _ in range(200):
        later = Later()
        strand, ran = Strand(later), []
        barrier = threading.Barrier(2)

        def first(number: int, strand: Strand = strand, barrier: Any = barrier, ran: Any = ran) -> None:
            barrier.wait()
            strand.post(ran.append, number)

        threads = [threading.Thread(target=first, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        later.run_all()
        assert sorted(ran) == [0, 1]
