"""Do generated images look like real ones: the Fréchet distance, the probe, and the features of the FID's Inception."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch.nn import functional as F

from vhs import inception, metrics

few = hypothesis_settings(max_examples=25, deadline=None)
shapes = st.tuples(st.integers(0, 10**6), st.integers(2, 30), st.integers(2, 30), st.integers(1, 12))


def table(features: np.ndarray, label=1, images_per_patient: int = 1) -> pd.DataFrame:
    patient = [f"p{i // images_per_patient}" for i in range(len(features))]
    return pd.DataFrame({"label": label, "patient": patient, "feature": list(features)})


def test_the_distance_of_two_normal_distributions_by_hand():
    a = np.array([[-1.0, 0], [1, 0], [-1, 0], [1, 0]])  # mean 0, variances 4/3 and 0
    b = a * 3 + (2, 5)  # mean (2, 5), variances 12 and 0
    assert metrics.frechet_distance(a, b) == pytest.approx(4 + 25 + (np.sqrt(12) - np.sqrt(4 / 3)) ** 2)


@few
@given(shapes)
def test_the_distance_is_the_one_with_a_matrix_root(shape):
    seed, n, m, d = shape
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)), rng.normal(1, 2, size=(m, d))
    covariances = [np.atleast_2d(np.cov(values, rowvar=False)) for values in (a, b)]
    root = np.real(np.trace(sqrtm(covariances[0] @ covariances[1] + 1e-12 * np.eye(d))))
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum(np.trace(c) for c in covariances) - 2 * root
    assert metrics.frechet_distance(a, b) == pytest.approx(want, rel=1e-3, abs=1e-3)


@few
@given(shapes)
def test_the_distance_is_symmetric_zero_to_itself_and_blind_to_order(shape):
    seed, n, m, d = shape
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, d)), rng.normal(0.5, 1, size=(m, d))
    assert metrics.frechet_distance(a, b) == pytest.approx(metrics.frechet_distance(b, a), abs=1e-9) and metrics.frechet_distance(a, b) >= 0
    assert metrics.frechet_distance(a, rng.permutation(a)) == pytest.approx(0, abs=1e-8)
    assert metrics.frechet_distance(a, a + 3) == pytest.approx(9 * d, rel=1e-6)


def test_the_distance_by_class_stands_beside_what_real_halves_score():
    rng = np.random.default_rng(0)
    real = pd.concat([table(rng.normal(size=(60, 8)), label, images_per_patient=2) for label in range(3)])
    like = pd.concat([table(rng.normal(size=(90, 8)), label) for label in (0, 1)])
    unlike = table(rng.normal(2, 1, size=(90, 8)), 2)
    found = metrics.frechet_by_class(real, pd.concat([like, unlike])).set_index("class")
    assert list(found.index) == ["small", "normal", "large"] and (found["images each"] == 30).all()
    ratio = found["real to generated"] / found["real to real"]
    assert (ratio[["small", "normal"]] < 1.5).all() and ratio["large"] > 10
    assert (found.distance < found["real to generated"])[["small", "normal"]].all()  # more images, less bias
    assert metrics.frechet_by_class(real, like[:3]).empty and metrics.frechet_by_class(real, like).shape[0] == 2


def test_one_patient_cannot_be_halved():
    rng = np.random.default_rng(0)
    real = table(rng.normal(size=(8, 4)), images_per_patient=8)
    found = metrics.frechet_by_class(real, table(rng.normal(size=(8, 4))))
    assert found["distance"].notna().all() and found["real to real"].isna().all()


@pytest.mark.parametrize("seed", range(3))
def test_the_probe_tells_what_differs_and_nothing_else(seed):
    rng = np.random.default_rng(seed)
    real = pd.concat([table(rng.normal(label, 1, size=(n, 6)), label) for label, n in enumerate((20, 60, 60))])
    same = pd.concat([table(rng.normal(label, 1, size=(80, 6)), label) for label in range(3)])  # another class mix, the same look
    assert metrics.probe_auroc(real, same)["images"] == 2 * 140
    assert 0.35 < metrics.probe_auroc(real, same)["auroc"] < 0.65
    planted = same.assign(feature=[feature + (0, 0, 1.5, 0, 0, 0) for feature in same.feature])
    assert metrics.probe_auroc(real, planted)["auroc"] > 0.8


def test_the_probe_keeps_patients_together():
    """A patient's images share a mark that means nothing: a probe that saw the patient would know them again."""
    rng = np.random.default_rng(1)
    marks = np.repeat(rng.normal(0, 3, size=(12, 40)), 5, axis=0)
    real, generated = table(marks + 0.1 * rng.normal(size=(60, 40)), images_per_patient=5), table(rng.normal(0, 3, size=(60, 40)))
    kept, torn = (metrics.probe_auroc(rows, generated)["auroc"] for rows in (real, real.assign(patient=[f"{i}" for i in range(60)])))
    assert torn > kept + 0.1
    assert metrics.probe_auroc(real[:10], generated) is None  # two patients


def test_the_fids_pooling_counts_no_border_and_ends_in_a_maximum():
    from torchvision.models import inception as tv

    torch.manual_seed(0)
    net = torch.nn.Module()
    kinds = {"Mixed_5": lambda: tv.InceptionA(8, 4), "Mixed_6": lambda: tv.InceptionC(8, 4), "Mixed_7": lambda: tv.InceptionE(8)}
    for name in inception.BLOCKS:
        net.add_module(name, kinds[name[:-1]]())
    inception.pool_as_fid(net.eval())
    x = torch.rand(2, 8, 9, 9)
    for name in ("Mixed_5b", "Mixed_6e", "Mixed_7b", "Mixed_7c"):
        block = getattr(net, name)
        pooled = F.max_pool2d(x, 3, 1, 1) if name == "Mixed_7c" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        want = F.relu(block.branch_pool.bn(block.branch_pool.conv(pooled)))
        width = want.shape[1]
        with torch.inference_mode():
            assert torch.allclose(block(x)[:, -width:], want, atol=1e-5), name


def test_inception_reads_the_fids_weights_and_refuses_others(tmp_path):
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    net = inception_v3(num_classes=inception.OUTPUTS, aux_logits=False, transform_input=False, init_weights=False)
    torch.save(net.state_dict(), tmp_path / "fid.pth")
    loaded = inception.load(tmp_path / "fid.pth")
    images = np.random.default_rng(0).integers(0, 255, (2, 64, 64), np.uint8)
    found = inception.features(loaded, images)
    assert found.shape == (2, inception.CHANNELS) and np.isfinite(found).all()
    assert np.allclose(inception.features(loaded, images[:1]), found[:1], atol=1e-4)
    torch.save(inception_v3(aux_logits=False, init_weights=False).state_dict(), tmp_path / "imagenet.pth")
    with pytest.raises(ValueError, match="no weights of the FID's Inception .1008 outputs, got 1000."):
        inception.load(tmp_path / "imagenet.pth")
    with pytest.raises(ValueError, match="is no file: give pytorch-fid's"):
        inception.load(tmp_path / "absent.pth")
