from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dino_core.backbones import build_backbone
from dino_core.config import ModelConfig
from dino_core.eval import (
    LinearProbes,
    Probe,
    best_probe,
    intermediate_layers,
    pooled_tokens,
    probe_tokens,
    shuffled_batches,
)


def problem(num=120, blocks=2, width=6, seed=0, spread=1.0):
    """Tokens [n, blocks + 1, width] of three classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num,), generator=generator)
    centres = torch.randn(3, blocks + 1, width, generator=torch.Generator().manual_seed(99))
    return centres[labels] + spread * torch.randn(num, blocks + 1, width, generator=generator), labels * 4 + 1


CLASSES = torch.tensor([1, 5, 9])


def by_torch(probe, batches, num_epochs, num_steps, lr_by):
    """One probe alone, by autograd and torch's SGD."""
    inputs = probe.inputs(next(iter(batches(0)))[0]).shape[1]
    layer = nn.Linear(inputs, 3)
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(3, inputs, generator=torch.Generator().manual_seed(0)))
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=probe.lr, momentum=0.9, weight_decay=0)
    total = num_epochs * num_steps if lr_by == "step" else num_epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=0)
    for epoch in range(num_epochs):
        for tokens, labels in batches(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(probe.inputs(tokens)), torch.searchsorted(CLASSES, labels)).backward()
            optimizer.step()
            if lr_by == "step":
                schedule.step()
        if lr_by == "epoch":
            schedule.step()
    return layer


@pytest.mark.parametrize("lr_by", ["step", "epoch"])
def test_each_probe_of_a_grid_is_that_of_torch_alone(lr_by):
    tokens, labels = problem()
    grid = [Probe(lr, blocks, pool) for lr in (0.001, 0.1) for blocks in (1, 2) for pool in (False, True)]
    batches = shuffled_batches(tokens, labels, 50)  # 3 steps, the last of 20
    probes = LinearProbes(grid, CLASSES)
    probes.fit(batches, 4, 3, lr_by=lr_by)
    found = {
        probe: logits
        for group in probes._groups
        for probe, logits in zip(group.probes, group.logits(tokens).unbind(1), strict=True)
    }
    for probe in grid:
        alone = by_torch(probe, batches, 4, 3, lr_by)(probe.inputs(tokens))
        torch.testing.assert_close(found[probe], alone.detach(), rtol=1e-4, atol=1e-5)
        expected = 100 * (CLASSES[alone.argmax(dim=1)] == labels).double().mean().item()
        assert probes.accuracies([(tokens[:70], labels[:70]), (tokens[70:], labels[70:])])[probe] == pytest.approx(
            expected
        )


def test_it_comes_to_scikit_learns_optimum():
    """Many small steps on all images, without a penalty: the accuracy of logistic regression with a large C."""
    from sklearn.linear_model import LogisticRegression

    (tokens, labels), (test_tokens, truth) = problem(spread=2.0), problem(400, seed=1, spread=2.0)
    theirs = LogisticRegression(C=1e6, max_iter=2000).fit(tokens[:, 1].numpy(), labels.numpy())
    assert 50 < 100 * theirs.score(tokens[:, 1].numpy(), labels.numpy()) < 99  # so that there is an optimum
    probes = LinearProbes([Probe(0.5)], CLASSES)
    probes.fit(shuffled_batches(tokens, labels, 120), 1000, 1)
    expected = 100 * theirs.score(test_tokens[:, 1].numpy(), truth.numpy())
    assert probes.accuracies([(test_tokens, truth)])[Probe(0.5)] == pytest.approx(expected, abs=0.3)


def test_inputs_are_the_last_class_tokens_and_the_patches():
    tokens = torch.arange(4.0).view(1, 4, 1)  # three blocks, then patches
    assert Probe(1, 1).inputs(tokens).tolist() == [[2]]
    assert Probe(1, 3).inputs(tokens).tolist() == [[0, 1, 2]]
    assert Probe(1, 2, True).inputs(tokens).tolist() == [[1, 2, 3]]
    assert Probe(1).inputs(pooled_tokens(torch.tensor([[5.0, 6.0]]))).tolist() == [[5, 6]]


def test_tokens_of_a_vit_are_those_of_its_blocks():
    model = ModelConfig(backbone="vit_tiny_patch16_224", patch_size=4, embed_dim=12, depth=3, num_heads=2)
    backbone = build_backbone(model, 16).eval()
    images = torch.randn(2, 3, 16, 16)
    tokens = probe_tokens(backbone, images, 2)
    layers = intermediate_layers(backbone, images, 2)
    assert tokens.shape == (2, 3, 12)
    assert torch.equal(tokens[:, 1], layers[1].class_token)
    assert torch.equal(tokens[:, 2], layers[1].patches.flatten(1, 2).mean(dim=1))
    torch.testing.assert_close(tokens[:, 1], backbone(images).detach())
    with pytest.raises(ValueError, match="has no class token"):
        probe_tokens(build_backbone(ModelConfig(backbone="resnet10t"), 32), torch.randn(1, 3, 32, 32), 1)


def test_batches_are_shuffled_by_seed_and_epoch():
    tokens, labels = problem(10)
    batches = shuffled_batches(tokens, labels, 4, seed=1)
    first = torch.cat([rows for rows, _ in batches(0)])
    assert [len(rows) for rows, _ in batches(0)] == [4, 4, 2]
    assert torch.equal(first, torch.cat([rows for rows, _ in batches(0)]))
    assert not torch.equal(first, torch.cat([rows for rows, _ in batches(1)]))
    assert torch.equal(first.sum(dim=0), tokens[first[:, 0, 0].argsort()].sum(dim=0)) or torch.allclose(
        first.sum(dim=0), tokens.sum(dim=0), atol=1e-4
    )


def test_a_probe_that_diverges_is_told_and_never_the_best():
    tokens, labels = problem()
    wild, tame = Probe(1e30), Probe(0.01)
    probes = LinearProbes([wild, tame], CLASSES)
    probes.fit(shuffled_batches(tokens * 1e10, labels, 40), 3, 3)
    assert math.isnan(probes.accuracies([(tokens, labels)])[wild])
    assert best_probe({wild: math.nan, tame: 1.0}) == tame
    assert best_probe({tame: 1.0, wild: 1.0}) == tame
    with pytest.raises(ValueError, match="no linear probe has finite weights"):
        best_probe({wild: math.nan})


def test_one_class_and_one_image():
    tokens = torch.randn(1, 2, 3)
    probes = LinearProbes([Probe(0.1)], torch.tensor([7]))
    probes.fit(shuffled_batches(tokens, torch.tensor([7]), 16), 2, 1)
    assert probes.accuracies([(tokens, torch.tensor([7]))]) == {Probe(0.1): 100}
    assert probes.accuracies([(tokens, torch.tensor([3]))]) == {Probe(0.1): 0}  # a class that was not learned


def test_what_cannot_be_trained_is_an_error():
    tokens, labels = problem()
    for probes in ([], [Probe(0.1), Probe(0.1)], [Probe(0.0)], [Probe(math.inf)], [Probe(0.1, 0)]):
        with pytest.raises(ValueError, match="must"):
            LinearProbes(probes, CLASSES)
    with pytest.raises(ValueError, match=r"must be \[B, S, D\] with S > 3"):
        LinearProbes([Probe(0.1, 3)], CLASSES).fit(shuffled_batches(tokens, labels, 40), 1, 3)
    with pytest.raises(ValueError, match="labels: hold a class"):
        LinearProbes([Probe(0.1)], CLASSES).fit(shuffled_batches(tokens, labels + 1, 40), 1, 3)
