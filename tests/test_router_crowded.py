"""A node that names more places than it may have: what it loses, that others lose nothing, and how it is told."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvd.router import numbering
from kvd.router.fleet import nodes
from tests import router_models
from tests.fleet_harness import Publishing, World, node


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = router_models.with_special(router_models.byte_level())
    return router_models.folder(tmp_path_factory.mktemp("model"), made)


@pytest.fixture
def two(model: Path) -> Iterator[tuple[Publishing, Publishing]]:
    with Publishing(model) as liar, Publishing(model) as honest:
        yield liar, honest


def test_one_node_takes_no_places_from_another(
    two: tuple[Publishing, Publishing], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numbering, "MOST_HOLDERS", 4)
    monkeypatch.setattr(nodes, "MOST_HOLDERS", 4)
    liar, honest = two
    liar.events.do("store", 11)
    for n, medium in enumerate(("CPU_PINNED", "DISK", "EXTERNAL", "TAPE")):
        liar.events.do("store", 20 + n, medium=medium)
    with (
        node(liar.url) as (_, lies),
        node(honest.url) as (_, at),
        World(liar.url, honest.url, nodes=[lies, at]) as world,
    ):
        world.until(lambda: world.fleet.describe()[f'node_crowded{{node="{lies.events}"}}'] == 1)
        honest.events.do("store", 11)
        honest.events.do("store", 12, parent=11, medium="CPU_PINNED")
        world.until(lambda: world.has([11]).get(honest.url) == (4, 0, 0, 0, 0))
        world.until(lambda: world.view(honest.url).credit)
        assert world.fleet.describe()[f'node_crowded{{node="{at.events}"}}'] == 0
        world.until(lambda: "than one node may have" in world.view(liar.url).why)
        assert "kvdctl" in world.view(liar.url).remedy
        assert not world.view(liar.url).credit
        said = [line for line in caplog.messages if "than one node may have" in line]
        assert [lies.events in line for line in said] == [True], "once, and of that node"


def test_a_node_that_named_too_many_counts_again_once_it_names_fewer(
    two: tuple[Publishing, Publishing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "MOST_HOLDERS", 2)
    monkeypatch.setattr(nodes, "HEAL_S", 0.5)
    worker, _ = two
    with node(worker.url) as (_, at), World(worker.url, nodes=[at]) as world:
        for n, medium in enumerate((None, "CPU_PINNED", "DISK")):
            worker.events.do("store", 20 + n, **({"medium": medium} if medium else {}))
        world.until(lambda: "than one node may have" in world.view(worker.url).why)
        worker.events.do("clear")
        worker.events.do("store", 5)
        world.until(lambda: world.has([5]) == {worker.url: (4, 0, 0, 0, 0)})
        world.until(lambda: world.view(worker.url).credit)
        assert world.fleet.describe()[f'node_crowded{{node="{at.events}"}}'] == 0
