"""The image classifier: pixels, features, heads and prototypes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers import generator
from loralloy.errors import LoralloyError
from loralloy.live.vision import HEAD_FILE, ImageClassifier, affines, load_backbone, prototype_logits
from vision_scenes import CLASSES, classifier, pictures, tiny_dinov2


def test_features_are_the_class_token_beside_the_mean_patch():
    c = classifier()
    images, _ = pictures(4)
    hidden = c.backbone(pixel_values=c.pixels(images)).last_hidden_state
    want = torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1)
    torch.testing.assert_close(c.features(images), want)
    assert hidden.shape[1] == 5 and want.shape == (4, 32)


def test_register_tokens_are_no_patches():
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    config = Dinov2WithRegistersConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, image_size=28, patch_size=14, num_register_tokens=3
    )
    backbone = Dinov2WithRegistersModel(config).eval()
    c = ImageClassifier(backbone, CLASSES, size=28)
    images, _ = pictures(2)
    hidden = backbone(pixel_values=c.pixels(images)).last_hidden_state
    assert hidden.shape[1] == 1 + 3 + 4
    torch.testing.assert_close(c.features(images)[:, 16:], hidden[:, 4:].mean(1))


def test_a_plain_vit_at_another_size_than_its_own():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32, image_size=32, patch_size=8
    )
    c = ImageClassifier(ViTModel(config, add_pooling_layer=False).eval(), CLASSES, size=16)
    assert c(pictures(2)[0]).shape == (2, 3)


def test_pixels_are_normalised_and_resized_as_pillow_does():
    image = pytest.importorskip("PIL.Image")
    c = classifier()
    images = pictures(2, size=20)[0] // 2 + 60  # no overshoot to clip: pillow clips after each direction too
    for picture, got in zip(images, c.pixels(images), strict=True):
        resized = image.fromarray(picture.permute(1, 2, 0).numpy()).resize((28, 28), image.Resampling.BICUBIC)
        want = torch.tensor(list(resized.tobytes())).view(28, 28, 3).permute(2, 0, 1).float() / 255
        mean, deviation = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        back = got * deviation.view(3, 1, 1) + mean.view(3, 1, 1)
        assert float((back - want).abs().max()) < 2 / 255  # and rounds


def test_batches_change_nothing():
    c = classifier()
    images, _ = pictures(7)
    torch.testing.assert_close(c.batched_features(images, 3), c.batched_features(images))
    assert torch.equal(c.predict(images, 2), c.predict(images)) and c.predict(images).dtype == torch.int64


def test_a_random_head_is_its_seed():
    one, same, other = classifier(), classifier(), classifier()
    other.draw_head(1)
    assert torch.equal(one.linear.weight, same.linear.weight)
    assert not torch.equal(one.linear.weight, other.linear.weight)
    assert not any(p.requires_grad for p in one.parameters())
    assert float(one.linear.weight.abs().max()) <= 32**-0.5


def test_a_saved_head_is_loaded_or_refused(tmp_path):
    from safetensors.torch import save_file

    c = classifier()
    with pytest.raises(LoralloyError, match="frozen head"):
        c.load_head(tmp_path)
    tensors = {"weight": torch.randn(3, 32, generator=generator(0)), "bias": torch.ones(3)}
    save_file(tensors, tmp_path / HEAD_FILE)
    c.load_head(tmp_path)
    features = torch.randn(5, 32, generator=generator(1))
    torch.testing.assert_close(c.logits(features), features @ tensors["weight"].T + 1)
    with pytest.raises(LoralloyError, match="other classes or features"):
        classifier(classes=("a", "b")).load_head(tmp_path)


def nearest_mean(features, support, labels, classes, own=None):
    """Prototype cosines one by one, in float64."""
    support, features = support.double(), features.double()
    centre = torch.stack([support[labels == c].mean(0) for c in range(classes) if (labels == c).any()]).mean(0)
    unit = nn.functional.normalize(support - centre, dim=1)
    rows = []
    for i, feature in enumerate(features):
        z = nn.functional.normalize(feature - centre, dim=0)
        row = []
        for c in range(classes):
            members = (labels == c).nonzero().flatten().tolist()
            if own is not None and int(own[i]) in members and len(members) > 1:
                members.remove(int(own[i]))
            mean = unit[members].mean(0) if members else None
            row.append(-1.0 if mean is None else float(z @ mean / mean.norm()))
        rows.append(row)
    return torch.tensor(rows)


@given(st.integers(0, 10_000), st.booleans())
def test_prototypes_are_nearest_class_means(seed, apart):
    g = generator(seed)
    support, labels = torch.randn(9, 6, generator=g), torch.randint(0, 4, (9,), generator=g)
    own = torch.randperm(9, generator=g)[:5] if apart else None
    features = support[own] if apart else torch.randn(5, 6, generator=g)
    got = prototype_logits(features, support, labels, classes=4, temperature=0.5, own=own)
    want = nearest_mean(features, support, labels, 4, own) / 0.5
    assert float((got.double() - want).abs().max()) < 1e-4


def test_prototypes_are_those_of_the_composition_that_is_set():
    c = classifier(head="prototypes")
    images, labels = pictures(12)
    with pytest.raises(LoralloyError, match="no prototypes yet"):
        c.predict(images)
    c.fit_prototypes(images, labels)
    before = c(images)
    handle = c.backbone.layernorm.register_forward_hook(lambda module, args, output: output.flip(-1) * 2 + 1)
    assert not torch.allclose(c(images), before)
    c.fit_prototypes(images, labels)
    # the head sees a rotation, a scale and a shift of the same features: none of them moves a centred cosine
    torch.testing.assert_close(c(images), before, rtol=1e-4, atol=1e-4)
    handle.remove()


def test_augmentation_is_of_its_seed_and_step():
    one, same = affines(5, seed=3, step=2), affines(5, seed=3, step=2)
    assert one.shape == (5, 2, 3) and torch.equal(one, same)
    assert not torch.equal(one, affines(5, seed=3, step=3)) and not torch.equal(one, affines(5, seed=4, step=2))
    many = affines(2000, 0)
    size = many[:, :, :2].det().abs().rsqrt()
    assert float(size.min()) >= 0.85 - 1e-5 and float(size.max()) <= 1.15 + 1e-5
    assert float(many[:, :, 2].abs().max()) <= 0.16
    flipped = (many[:, :, :2].det() < 0).float().mean()
    assert 0.45 < float(flipped) < 0.55


def test_an_identity_augmentation_changes_nothing():
    c = classifier()
    images, _ = pictures(3)
    still = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(3, 2, 3)
    torch.testing.assert_close(c.pixels(images, still), c.pixels(images), rtol=1e-4, atol=1e-4)
    mirror = torch.tensor([[-1.0, 0, 0], [0, 1, 0]]).expand(3, 2, 3)
    torch.testing.assert_close(c.pixels(images, mirror), c.pixels(images).flip(-1), rtol=1e-4, atol=1e-4)


def test_gradients_reach_what_is_set_in_the_backbone():
    c = classifier(head="prototypes")
    images, labels = pictures(6)
    scale = torch.ones((), requires_grad=True)
    c.backbone.encoder.layer[0].register_forward_hook(
        lambda module, args, output: output * scale if isinstance(output, torch.Tensor) else (output[0] * scale,)
    )
    features = c.features(images)
    prototype_logits(features, features, labels, classes=3, own=torch.arange(6))[:, 0].sum().backward()
    assert scale.grad is not None and float(scale.grad.abs()) > 0


def test_a_folder_round_trip_and_its_refusals(tmp_path):
    model = tiny_dinov2()
    model.save_pretrained(tmp_path / "vit")
    loaded = load_backbone(tmp_path / "vit", "float32", "cpu")
    pixels = torch.randn(1, 3, 28, 28, generator=generator(0))
    torch.testing.assert_close(
        loaded(pixel_values=pixels).last_hidden_state, model(pixel_values=pixels).last_hidden_state
    )
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    with pytest.raises(LoralloyError, match=r"packaged_vit"):
        load_backbone(tmp_path / "nowhere")


def test_what_cannot_be_a_classifier():
    with pytest.raises(LoralloyError, match="no vision transformer"):
        ImageClassifier(nn.Linear(2, 2), CLASSES)
    with pytest.raises(LoralloyError, match="head 'mean' is unknown"):
        classifier(head="mean")
    with pytest.raises(LoralloyError, match="not whole patches of 14"):
        classifier(size=30)
    with pytest.raises(LoralloyError, match="at least two classes"):
        classifier(classes=("a", "a"))
