"What the chapter on redundancy does not show: bad input, odd pictures, ties, and both ways of finding pairs on many sizes."
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ptbook.basics.claims import as_scale
from ptbook.curate import redundancy
from ptbook.curate.redundancy import (
    dhash, embed, embedding_similarity, every_n, grey_image, hamming, hash_image, hash_leaders, leader_select, leaders, mutual_information, near_pairs,
    near_share, nt_xent, pack, random_subset, redundancy_report, reduce, reduce_records, ssim)


def noise(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
def near(threshold): return lambda one, others: np.bitwise_count(one ^ others) <= threshold


def crowded(n, seed=0, bits=9):
    "Hashes of which many are near: few seeds, each with up to `bits` flips."
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**64, max(1, n // 6), dtype=np.uint64)[rng.integers(0, max(1, n // 6), n)]
    flips = np.uint64(1) << rng.integers(0, 64, (n, bits), dtype=np.uint64)
    return base ^ np.bitwise_or.reduce(np.where(rng.random((n, bits)) < 0.4, flips, np.uint64(0)), 1)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 200])
@pytest.mark.parametrize("threshold", [0, 1, 6, 13, 40, 64])
def test_bands_miss_no_pair(n, threshold):
    hashes = crowded(n)
    brute = torch.triu(hamming(hashes, hashes) <= threshold, 1).nonzero().numpy()
    pairs = near_pairs(hashes, threshold)
    assert pairs.dtype == np.int64 and pairs.shape[1] == 2 and (pairs[:, 0] < pairs[:, 1]).all()
    assert {*map(tuple, pairs.tolist())} == {*map(tuple, brute.tolist())} and len(pairs) == len(brute)
    assert np.array_equal(pairs, pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))])
    assert abs(near_share(hashes, threshold) * max(n * (n - 1) / 2, 1) - len(pairs)) < 1e-6
    assert torch.equal(hash_leaders(hashes, None, threshold), leaders(hashes, near(threshold)))


@pytest.mark.parametrize("agree", [2, 3])
def test_more_bands_find_the_same(agree):
    assert np.array_equal(near_pairs(crowded(150), 4, agree), near_pairs(crowded(150), 4))


def test_a_crowd_of_equal_hashes_costs_nothing():
    hashes = np.zeros(100_000, np.uint64)
    hashes[50_000:] = 2**63
    assert hash_leaders(hashes).unique().tolist() == [0] and hash_leaders(hashes, threshold=0).unique().tolist() == [0, 50_000]


def test_leaders_of_mixed_groups():
    hashes, groups = crowded(120), ["b", "a", "c"] * 40
    leader = hash_leaders(hashes, groups)
    for g in "abc":
        at = np.flatnonzero(np.array(groups) == g)
        assert torch.equal(leader[at], torch.from_numpy(at)[hash_leaders(hashes[at])])
    kept = (leader == torch.arange(120)).nonzero()[:, 0]
    assert all((hamming(hashes[[i]], hashes[[leader[i]]]) <= 6).all() and leader[i] <= i for i in range(120))
    assert torch.equal(hash_leaders(hashes[kept], np.array(groups)[kept]), torch.arange(len(kept))) # nothing more to take
    assert leader_select(hashes, near(6), groups).tolist() == kept.tolist()


@pytest.mark.parametrize("shift", [7.0, -100.0])
def test_the_hash_ignores_light_at_any_margin(shift):
    x = noise(10, 30, 40)
    for margin in (0.0, 0.02, 0.3): assert torch.equal(dhash(x, margin=margin), dhash(0.01 * x + shift / 100, margin=margin))


def test_the_hash_of_other_forms():
    x = noise(4, 1, 12, 15)
    assert torch.equal(dhash(x), dhash(x[:, 0])) and torch.equal(dhash(x), dhash(x.double())) and dhash(x, size=4).shape == (4, 16)
    assert not dhash(torch.full((2, 9, 9), 3.0)).any() and dhash((255 * x).to(torch.uint8)).dtype == torch.bool
    assert torch.equal(dhash(noise(3, 2, 2)), dhash(noise(3, 2, 2)))
    assert dhash(torch.empty(0, 9, 9)).shape == (0, 64) and pack(dhash(torch.empty(0, 9, 9))).shape == (0,)
    for i in (0, 5, 63): # bit i is worth 2 ** i
        bits = torch.zeros(1, 64, dtype=torch.bool)
        bits[0, i] = True
        assert pack(bits)[0] == 2**i


def test_similarities():
    a, b = noise(6, 1, 20, 20), noise(6, 1, 20, 20, seed=1)
    assert torch.allclose(ssim(a, b), ssim(b, a), atol=1e-6) and torch.allclose(mutual_information(a, b), mutual_information(b, a))
    assert (ssim(a, b) < 0.5).all() and (mutual_information(a, b, bins=4) < 0.2).all() and (mutual_information(a, b) > -1e-9).all()
    assert torch.allclose(ssim(a[:1], b), torch.cat([ssim(a[:1], b[i:i + 1]) for i in range(6)]), atol=1e-6)
    assert torch.allclose(ssim(3 * a, 3 * b, data_range=3.0), ssim(a, b), atol=1e-5)
    assert torch.allclose(mutual_information(a, 1 - a), mutual_information(a, a), atol=0.05) # a negative tells as much
    assert mutual_information(a, torch.ones(1, 20, 20)).abs().max() < 1e-9
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(400, 5))
    assert torch.allclose(embedding_similarity(net, a, b), embedding_similarity(net, b, a).T, atol=1e-6) and net.training
    assert torch.allclose(embed(net, a, batch=2), embed(net, a), atol=1e-6) and torch.allclose(embed(net, a).norm(dim=1), torch.ones(6))


def test_ssim_is_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = noise(1, 20, 24), noise(1, 20, 24, seed=1)
    assert abs(ssim(a, b).item() - metrics.structural_similarity(a[0].numpy(), b[0].numpy(), data_range=1.0)) < 1e-5


@pytest.mark.parametrize("method, settings", [("hash", {}), ("ssim", dict(threshold=0.9)), ("mutual information", dict(threshold=1.0, bins=8)), ("embedding", dict(threshold=0.999, model=nn.Flatten()))])
def test_every_method_takes_copies_and_leaves_the_rest(method, settings):
    x = noise(8, 1, 16, 16)
    twice = reduce(x.repeat(2, 1, 1, 1), [0] * 16, method, **settings)
    assert twice.kept.tolist() == list(range(8)) and twice.leader.tolist() == 2 * list(range(8))
    apart = reduce(x.repeat(2, 1, 1, 1), [0] * 8 + [1] * 8, method, **settings)
    assert len(apart.kept) == 16
    assert reduce(x[:1], [0], method, **settings).kept.tolist() == [0]


def encoded(x: np.ndarray, form: str = "PNG") -> bytes:
    Image.fromarray(x).save(file := io.BytesIO(), format=form)
    return file.getvalue()


def test_pictures_of_any_kind(tmp_path):
    x = (255 * noise(20, 30)).numpy().astype(np.uint8)
    (tmp_path / "x.png").write_bytes(encoded(x))
    forms = [x, Image.fromarray(x), encoded(x), {"bytes": encoded(x), "path": None}, {"bytes": None, "path": str(tmp_path / "x.png")}, tmp_path / "x.png", np.stack([x] * 3, -1), torch.from_numpy(x)]
    assert len({hash_image(form) for form in forms}) == 1
    deep = (x.astype(np.uint16) * 200)
    assert grey_image(encoded(deep)).max() == deep.max() and hash_image(encoded(deep)) == hash_image(x) # not cut at 255
    for wrong in (b"", b"GIF89a", encoded(x)[:100], np.zeros((1, 9)), np.zeros(5), np.array([["a", "b"]] * 2), None, {"bytes": None, "path": None}):
        with pytest.raises(Exception): hash_image(wrong)


def test_a_stream_loses_nothing():
    x = (255 * noise(3, 20, 30)).numpy().astype(np.uint8)
    rows = [x[0], None, x[1], x[0], encoded(x[0])[:90], np.full((20, 30), np.nan), x[2], Image.fromarray(x[1])]
    found = reduce_records({"image": r} for r in rows)
    assert found.kept.tolist() == [0, 2, 6] and sorted(found.unreadable) == [1, 4, 5] and found.leader.tolist() == [0, -1, 2, 0, -1, -1, 6, 2]
    assert found.reasons[3] == "like record 0" and found.reasons[7] == "like record 2" and found.reasons[1].startswith("unreadable: ")
    assert "8 records: 3 kept, 2 dropped, 3 unreadable" in repr(found)
    assert found.take(range(8)) == [0, 2, 6]
    assert len(reduce_records([]).leader) == 0 and len(reduce_records([{"image": None, "v": 1}], group="v").kept) == 0
    with pytest.raises(KeyError, match="record 1.*'image'.*picture"): reduce_records([{"image": x[0]}, {"picture": x[0]}])
    with pytest.raises(KeyError, match="volume"): reduce_records([{"image": x[0]}], group="volume")


def test_tables_of_datasets(tmp_path):
    from datasets import Dataset, Features, Image as Picture, Value
    x = (255 * noise(4, 20, 30)).numpy().astype(np.uint8)
    cells = [{"bytes": encoded(x[i % 4]), "path": None} for i in range(10)] + [{"bytes": b"broken", "path": None}]
    table = Dataset.from_dict({"image": cells, "volume": ["a"] * 5 + ["b"] * 6}, features=Features({"image": Picture(), "volume": Value("string")}))
    for rows in (table, table.to_iterable_dataset()):
        found = reduce_records(rows, group="volume")
        assert found.kept.tolist() == [0, 1, 2, 3, 5, 6, 7, 8] and found.reasons[10].startswith("unreadable")
    assert found.take(table)["volume"][:] == ["a"] * 4 + ["b"] * 4


def test_report():
    hashes = np.array([0, 1, 2**40 - 1, 0, 3], np.uint64)
    report = redundancy_report(hashes, ["x", "x", "x", "y", "y"])
    assert report.groups == {"x": (3, 2), "y": (2, 1)} and report.distances.sum() == 4 and report.distances[[1, 2, 39, 40]].tolist() == [1, 1, 1, 1]
    assert report.near == 0.5 and "| x | 3 | 2 | 66.7% |" in report._repr_markdown_() and "all 2" in report._repr_markdown_()


def test_strides_and_subsets():
    for n, k in ((100, 37), (5743, 324), (10, 10), (7, 1)): assert len(every_n(torch.zeros(n), n / k)) == k
    assert every_n(["a", "b", "a", "b", "a"], 2).tolist() == [0, 1, 4] and every_n([], 2).tolist() == []
    picked = random_subset(50, 20, torch.Generator().manual_seed(0))
    assert len(picked.unique()) == 20 and torch.equal(picked, picked.sort().values) and torch.equal(picked, random_subset(50, 20, torch.Generator().manual_seed(0)))


def test_what_is_refused():
    x, h = noise(4, 1, 8, 8), crowded(4)
    for wrong in (noise(4, 3, 8, 8), noise(4, 8), noise(4, 1, 8), x.log().clamp(min=-torch.inf) * torch.inf, x.numpy()):
        with pytest.raises(ValueError, match="images"): dhash(wrong)
    with pytest.raises(ValueError, match="size=0"): dhash(x, size=0)
    with pytest.raises(ValueError, match="margin=-1"): dhash(x, margin=-1)
    with pytest.raises(ValueError, match="bits"): pack(dhash(x, size=9))
    with pytest.raises(ValueError, match="data_range=0"): ssim(x, x, data_range=0.0)
    with pytest.raises(ValueError, match="window=9"): ssim(x, x, window=9)
    with pytest.raises(ValueError, match="bins=1"): mutual_information(x, x, bins=1)
    with pytest.raises(ValueError, match=r"groups: got \(3,\)"): hash_leaders(h, [0, 1, 2])
    for threshold in (-1, 65):
        with pytest.raises(ValueError, match="threshold"): hash_leaders(h, threshold=threshold)
        with pytest.raises(ValueError, match="threshold"): near_pairs(h, threshold)
    with pytest.raises(ValueError, match="agree=0"): near_pairs(h, 6, 0)
    with pytest.raises(ValueError, match="'phash'.*hash, ssim"): reduce(x, None, "phash")
    with pytest.raises(ValueError, match="threshold: got None"): reduce(x, None, "ssim")
    with pytest.raises(ValueError, match="n=0.5"): every_n([0, 0], 0.5)
    with pytest.raises(ValueError, match="k=3"): random_subset(2, 3)
    with pytest.raises(ValueError, match="source"): redundancy.balanced(None, (100, 10_000), 0)


def test_the_arms_differ_in_their_pictures_alone():
    w = redundancy.world(7, as_scale("tiny"))
    kept = redundancy.choices(w, pack(dhash(w.slices)), 7)
    assert len(kept["Hash"]) == len(kept["EveryN"]) == len(kept["random"]) < len(kept["ALL"]) == len(w.slices)
    assert len(kept["one per organ"]) == len(w.organ.unique()) and w.organ[kept["one per organ"]].tolist() == w.organ.unique().tolist()
    assert w.slices[0].shape == (1, 16, 16) and len(w.probe[0]) == 60 and len(w.test[0]) == 200
    again = redundancy.world(7, as_scale("tiny"))
    assert torch.equal(w.slices, again.slices) and torch.equal(w.test[0], again.test[0])
    views = [redundancy.Pairs(w.slices[kept[arm]], 32, 0)[2] for arm in ("ALL", "Hash")]
    assert views[0][0].shape == views[1][0].shape == (32, 1, 16, 16)


def test_alike_pairs_push_no_longer():
    a, b = noise(4, 6).requires_grad_(), noise(4, 6, seed=1)
    alike = torch.zeros(4, 4, dtype=torch.bool)
    assert torch.equal(nt_xent(a, b, alike=alike), nt_xent(a, b))
    alike[0, 1] = alike[1, 0] = True
    assert nt_xent(a, b, alike=alike) < nt_xent(a, b)
    alike = ~torch.eye(4, dtype=torch.bool)
    assert nt_xent(a, b, alike=alike).abs() < 1e-6 and torch.equal(nt_xent(a, b, alike=torch.eye(4, dtype=torch.bool)), nt_xent(a, b))
