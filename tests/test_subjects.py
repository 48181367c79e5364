"""The model under study: its digest, by which measured points are known again."""

import torch
from conftest import build

from fxbasis.subjects import subject_of


def test_the_digest_takes_scalars_of_batchnorm_and_tells_weights_and_data_apart() -> None:
    net, data = build("plain"), torch.randn(2, 3, 8, 8)
    first = subject_of(net, net.example, [data]).digest("measured")
    assert subject_of(net, net.example, [data]).digest("measured") == first
    assert subject_of(net, net.example, [data + 1]).digest("measured") != first
    net.bn.num_batches_tracked += 1
    assert subject_of(net, net.example, [data]).digest("measured") != first
