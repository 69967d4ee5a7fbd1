from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dino_core.eval import faiss_neighbours, nearest_neighbours, neighbours


def by_sorting(gallery, queries, k):
    """Every similarity, in a stable order; in float64 where `gallery` is."""
    similarities = F.normalize(queries, dim=1) @ F.normalize(gallery, dim=1).T
    ordered, places = similarities.sort(dim=1, descending=True, stable=True)
    return ordered[:, :k], places[:, :k]


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(neighbours, "_QUERIES", 7)
    monkeypatch.setattr(neighbours, "_GALLERY", 300)
    monkeypatch.setattr(neighbours, "_TILE", 64)
    monkeypatch.setattr(neighbours, "_GROUP", 4)


SIZES = [
    (1, 1, 1),
    (5, 3, 5),
    (16, 2, 3),
    (63, 30, 5),
    (64, 7, 8),
    (65, 8, 3),
    (299, 20, 31),
    (301, 20, 40),
    (1000, 23, 900),
]


@pytest.mark.parametrize(("n", "m", "k"), SIZES)
def test_equals_sorting_whatever_the_chunks(n, m, k, small_chunks):
    generator = torch.Generator().manual_seed(n)
    gallery, queries = (torch.randn(rows, 12, generator=generator, dtype=torch.float64) for rows in (n, m))
    similarities, places = nearest_neighbours(gallery, queries, k)
    expected, expected_places = by_sorting(gallery, queries, k)
    assert similarities.dtype == torch.float32
    torch.testing.assert_close(similarities, expected.float(), rtol=0, atol=1e-6)
    assert torch.equal(places, expected_places)


@pytest.mark.parametrize(("n", "m", "k"), SIZES)
def test_equal_similarities_come_in_the_order_of_the_gallery(n, m, k, small_chunks):
    """Products of these features are exact, and most are equal."""
    generator = torch.Generator().manual_seed(n)
    gallery, queries = (torch.eye(4)[torch.randint(4, (rows,), generator=generator)] for rows in (n, m))
    for asked in (gallery[:1].expand(n, 4), gallery):  # all alike, or of four kinds
        found, expected = nearest_neighbours(asked, queries, k), by_sorting(asked, queries, k)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_chunks_of_the_real_size():
    generator = torch.Generator().manual_seed(0)
    gallery, queries = (torch.randn(rows, 8, generator=generator) for rows in (2**16 + 5000, 40))
    similarities, places = nearest_neighbours(gallery.half(), queries, 30)
    expected, expected_places = by_sorting(gallery.half().double(), queries.double(), 30)
    torch.testing.assert_close(similarities, expected.float(), rtol=0, atol=1e-6)
    assert (places == expected_places).float().mean() > 0.999  # neighbours closer than rounding change places


def test_a_vector_of_zeros_is_like_no_other():
    similarities, places = nearest_neighbours(torch.tensor([[0.0, 0.0], [0.0, -1.0]]), torch.tensor([[0.0, 2.0]]), 2)
    assert similarities.tolist() == [[0, -1]]
    assert places.tolist() == [[0, 1]]


def test_faiss_that_searches_everything_is_exact():
    pytest.importorskip("faiss", reason="the extra faiss is not installed")
    generator = torch.Generator().manual_seed(0)
    gallery, queries = (torch.randn(rows, 16, generator=generator) for rows in (500, 40))
    expected = by_sorting(gallery, queries, 20)
    for num_lists in (1, 8):
        similarities, places = faiss_neighbours(gallery, queries, 20, num_lists=num_lists, num_probes=num_lists)
        torch.testing.assert_close(similarities, expected[0], rtol=0, atol=1e-6)
        assert torch.equal(places, expected[1])
    few = faiss_neighbours(gallery, queries, 200, num_lists=50, num_probes=1)
    assert ((few[1] < 0) == (few[0] == -torch.inf)).all()
    assert 0 < (few[1] >= 0).float().mean() < 0.5
    missing = few[1][:, :5] != faiss_neighbours(gallery, queries, 5, num_lists=50, num_probes=50)[1]
    assert 0 < missing.float().mean() < 1


def test_without_faiss_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(neighbours, "faiss_is_installed", lambda: False)
    with pytest.raises(ModuleNotFoundError, match="install the extra `faiss`"):
        faiss_neighbours(torch.eye(3), torch.eye(3), 1, num_lists=1, num_probes=1)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (partial(nearest_neighbours, k=4), "k = 4: must be >= 1 and <= 3"),
        (partial(faiss_neighbours, k=4, num_lists=1, num_probes=1), "k = 4: must be >= 1 and <= 3"),
        (partial(faiss_neighbours, k=1, num_lists=4, num_probes=1), "num_lists = 4: must be >= 1 and <= 3"),
        (partial(faiss_neighbours, k=1, num_lists=2, num_probes=3), "num_probes = 3: must be >= 1 and <= 2"),
    ],
)
def test_what_cannot_be_searched_is_an_error(search, message):
    with pytest.raises(ValueError, match=message):
        search(torch.eye(3), torch.eye(3))
    with pytest.raises(ValueError, match="queries: holds infinite values or NaN"):
        search(torch.eye(3), torch.eye(3) / 0)
