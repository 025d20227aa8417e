"The world of letters and digits: the same again when asked again, and nothing of the test in what is learnt."
import os

import pytest
import torch

from ptbook.basics import worlds
from ptbook.basics.claims import SCALES
from ptbook.basics.worlds import LETTERS, Views, accuracy, classifier, glyph_vit, letters, new_task, pretrained, warp

TINY = SCALES["tiny"]


def test_letters_are_split_by_family():
    (x, y), (u, v) = letters(), letters("test")
    assert x.shape[1:] == u.shape[1:] == (1, 28, 28) and set(y.tolist()) == set(v.tolist()) == set(range(len(LETTERS)))
    seen = {tuple(image.flatten().tolist()) for image in x}
    assert sum(tuple(image.flatten().tolist()) in seen for image in u) < 0.05 * len(u)
    assert len(set(LETTERS)) == len(LETTERS)


@pytest.mark.parametrize("how, other", [(dict(angle=0.3), dict(angle=-0.3)), (dict(zoom=1.25), dict(zoom=0.8)), (dict(shift=torch.tensor([[0.25, 0.0]])), dict(shift=torch.tensor([[-0.25, 0.0]])))])
def test_a_warp_is_undone_by_its_opposite(how, other):
    g = torch.linspace(-1, 1, 33)
    blob = torch.exp(-12 * ((g[:, None] - 0.1) ** 2 + (g[None] + 0.15) ** 2))[None, None]
    assert (warp(blob, **how) - blob).abs().max() > 0.1 and (warp(warp(blob, **how), **other) - blob).abs().max() < 0.08
    assert (warp(blob) - blob).abs().max() < 1e-5 and warp(blob, side=16).shape == (1, 1, 16, 16)


def test_each_image_is_warped_by_its_own_amount():
    x = torch.rand(3, 1, 8, 8)
    assert torch.allclose(warp(x, torch.pi / 2), torch.rot90(x, 1, (2, 3)), atol=1e-4)
    assert torch.allclose(warp(x, torch.tensor([0.0, 1.0, 0.0]))[[0, 2]], x[[0, 2]], atol=1e-6)


def test_views_depend_on_the_step_and_the_seed_alone():
    x, y = letters()
    a, b, c = Views(x, y, 8, seed=1), Views(x, y, 8, seed=1), Views(x, y, 8, seed=2)
    for step in (5, 0): assert torch.equal(a[step][0], b[step][0]) and torch.equal(a[step][1], b[step][1])
    assert not torch.equal(a[0][0], c[0][0]) and not torch.equal(a[0][0], a[1][0])
    still = Views(x, y, 8, seed=1, strength=0.0, noise=0.0)
    assert torch.equal(still[0][0], warp(x[still.stream.items(0)], side=16))


def test_pretrained_is_kept_and_a_damaged_file_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PTBOOK_CACHE", str(tmp_path))
    monkeypatch.setitem(worlds.STEPS, "tiny", 4)
    first = pretrained(0, TINY)
    file, = tmp_path.iterdir()
    monkeypatch.setattr(worlds, "fit", lambda *_, **__: pytest.fail("it was trained again"))
    again = pretrained(0, TINY)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), again.parameters())) and not again.training
    assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), glyph_vit(0).parameters()))
    monkeypatch.undo()
    monkeypatch.setenv("PTBOOK_CACHE", str(tmp_path))
    monkeypatch.setitem(worlds.STEPS, "tiny", 4)
    os.truncate(file, 100)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), pretrained(0, TINY).parameters()))


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("PTBOOK_CACHE", str(tmp_path/"file"/"cache"))
    monkeypatch.setitem(worlds.STEPS, "tiny", 1)
    with pytest.warns(UserWarning, match="could not be written"): pretrained(0, TINY)


def test_a_task_has_few_images_of_each_class_and_none_of_them_in_its_test():
    task = new_task(3, shots=7, tests=500)
    assert task.train[1].bincount().tolist() == [7] * 10 and len(task.test[1]) == 500
    whole = {tuple(x.flatten().tolist()) for x in task.train[0]}
    assert not whole & {tuple(x.flatten().tolist()) for x in task.test[0]}
    assert torch.equal(new_task(3, shots=7, tests=500).train[0], task.train[0]) and not torch.equal(new_task(4, shots=7, tests=500).train[0], task.train[0])
    assert (new_task(3, noise=0.0, invert=True).test[0] + new_task(3, noise=0.0, invert=False).test[0] - 1).abs().max() < 1e-6
    with pytest.raises(ValueError, match="shots=400"): new_task(0, shots=400)


def test_a_new_head_and_the_same_body():
    body = glyph_vit(0)
    made = classifier(body, 10, seed=1)
    assert made(torch.zeros(2, 1, 16, 16)).shape == (2, 10) and made.config.classes == 10
    assert all(torch.equal(p, body.get_parameter(n)) for n, p in made.named_parameters() if not n.startswith("head"))
    assert body(torch.zeros(1, 1, 16, 16)).shape == (1, len(LETTERS)) # left as it was
    x, y = torch.randn(7, 1, 16, 16), torch.arange(7)
    with torch.no_grad(): assert abs(accuracy(made, (x, y), batch=3) - (made(x).argmax(1) == y).float().mean().item()) < 1e-6
