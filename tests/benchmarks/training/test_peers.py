"""The peers of whole training steps compute what ours does."""

import pytest


def test_open_clip_with_our_weights_gives_our_loss_and_gradients() -> None:
    pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    from benchmarks.training.step_pair import Pair, gradients_of

    pair = Pair("tiny-vit", "stage2", "cpu", "open_clip")
    assert pair.agree()
    for step in (pair.our_step, pair.peer_step):
        step()
    ours, theirs = gradients_of(pair.clip), gradients_of(pair.peer)
    assert {
        "visual.conv1.weight",
        "bert.embeddings.word_embeddings.weight",
        "text_projection",
    } < theirs.keys()
    pair.peer.text.proj.weight.data += 0.1
    assert not pair.agree()
    assert ours.keys() == theirs.keys()
