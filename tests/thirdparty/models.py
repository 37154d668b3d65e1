"""Models of other libraries, built as their packages ship them: `MODELS` names each with its inputs and its package."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

Inputs = Callable[[int], Any]


@dataclass(frozen=True)
class ThirdParty:
    """One model: how to build it and which fusions and reasons for a miss its compilation must show."""

    name: str
    package: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    merged: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    missed: tuple[tuple[str, str], ...] = ()
    built: bool = False  # by Inductor too, in every run of the tests; the others where GRC_THIRDPARTY=all
    slow: bool = False  # left to make test-slow: the others write their layers in the same ways

    def model(self) -> tuple[nn.Module, Inputs]:
        """The module in eval mode, with weights that are the same in every process, and its inputs by batch size."""
        torch.manual_seed(0)
        module, inputs = self.build()
        return module.eval(), inputs


def seeded(batch: int) -> torch.Generator:
    return torch.Generator().manual_seed(batch)


FEATURES, WIDTH, ROWS, DENSE = 8, 16, 500, 13


def bags(features: int = FEATURES, weighted: bool = False) -> Any:
    from torchrec.modules.embedding_configs import EmbeddingBagConfig
    from torchrec.modules.embedding_modules import EmbeddingBagCollection

    tables = [
        EmbeddingBagConfig(name=f"t{i}", embedding_dim=WIDTH, num_embeddings=ROWS + i, feature_names=[f"f{i}"])
        for i in range(features)
    ]
    return EmbeddingBagCollection(tables=tables, is_weighted=weighted)


def jagged(batch: int, features: int = FEATURES, longest: int = 4) -> Any:
    """Bags of 0 to `longest` ids for every feature and row."""
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    generator = seeded(batch)
    lengths = torch.randint(0, longest + 1, (features * batch,), generator=generator)
    values = torch.randint(0, ROWS, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor(keys=[f"f{i}" for i in range(features)], values=values, lengths=lengths)


def with_dense(batch: int) -> tuple[Tensor, Any]:
    return torch.randn(batch, DENSE, generator=seeded(batch)), jagged(batch)


def torchrec_dlrm() -> tuple[nn.Module, Inputs]:
    from torchrec.models.dlrm import DLRM

    return DLRM(bags(), DENSE, [32, WIDTH], [32, 1]), with_dense


def torchrec_dlrm_dcn() -> tuple[nn.Module, Inputs]:
    from torchrec.models.dlrm import DLRM_DCN

    return DLRM_DCN(bags(), DENSE, [32, WIDTH], [32, 1], dcn_num_layers=3, dcn_low_rank_dim=8), with_dense


def torchrec_deepfm() -> tuple[nn.Module, Inputs]:
    from torchrec.models.deepfm import SimpleDeepFMNN

    return SimpleDeepFMNN(DENSE, bags(), hidden_layer_size=32, deep_fm_dimension=16), with_dense


def torchrec_dlrm_transformer() -> tuple[nn.Module, Inputs]:
    from torchrec.models.experimental.transformerdlrm import DLRM_Transformer

    return DLRM_Transformer(bags(), DENSE, [32, WIDTH], [32, 1], nhead=4, ntransformer_layers=2), with_dense


class Padded(nn.Module):
    """TorchRec's EmbeddingCollection over a user's history, padded, and scored by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        from torchrec.modules.embedding_configs import EmbeddingConfig
        from torchrec.modules.embedding_modules import EmbeddingCollection

        config = EmbeddingConfig(name="item_table", embedding_dim=WIDTH, num_embeddings=ROWS, feature_names=["f0"])
        self.history = EmbeddingCollection(tables=[config])
        self.score = nn.Linear(WIDTH, ROWS)

    def forward(self, history: Any) -> Tensor:
        steps = self.history(history)["f0"].to_padded_dense(5)
        return self.score(steps.mean(1))


def torchrec_sequence() -> tuple[nn.Module, Inputs]:
    return Padded(), lambda batch: (jagged(batch, 1, 8),)


def deepctr(name: str) -> Any:
    """A class of deepctr_torch, which asks the package index for a newer version in a thread when it is imported."""
    with mock.patch.object(threading.Thread, "start"):
        return getattr(importlib.import_module("deepctr_torch.models"), name)


def columns() -> tuple[list[Any], Inputs]:
    """Eight ids and three numbers a row, all in one float matrix."""
    deepctr("DeepFM")
    from deepctr_torch.inputs import DenseFeat, SparseFeat

    sparse = [SparseFeat(f"c{i}", ROWS + i, embedding_dim=WIDTH) for i in range(FEATURES)]

    def inputs(batch: int) -> tuple[Tensor]:
        generator = seeded(batch)
        ids = torch.randint(0, ROWS, (batch, FEATURES), generator=generator).float()
        return (torch.cat([ids, torch.randn(batch, 3, generator=generator)], 1),)

    return [*sparse, *(DenseFeat(f"i{i}", 1) for i in range(3))], inputs


def deepctr_model(name: str, **options: Any) -> tuple[nn.Module, Inputs]:
    features, inputs = columns()
    return larger(deepctr(name)(features, features, dnn_hidden_units=(32, 16), **options)), inputs


def larger(model: nn.Module) -> nn.Module:
    """Weights of a trained model's size: deepctr starts at 1e-4, at which every model answers 0.5."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.1, generator=generator)
    return model


def deepctr_afm() -> tuple[nn.Module, Inputs]:
    """It takes ids alone."""
    features, inputs = columns()
    sparse = features[:FEATURES]
    return larger(deepctr("AFM")(sparse, sparse)), lambda batch: (inputs(batch)[0][:, :FEATURES],)


def deepctr_pnn() -> tuple[nn.Module, Inputs]:
    features, inputs = columns()
    return larger(deepctr("PNN")(features, dnn_hidden_units=(32, 16))), inputs


def deepctr_din() -> tuple[nn.Module, Inputs]:
    din = deepctr("DIN")
    from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat

    item, category = SparseFeat("item", ROWS, embedding_dim=8), SparseFeat("cate", 50, embedding_dim=4)
    history = [
        VarLenSparseFeat(SparseFeat(f"hist_{c.name}", c.vocabulary_size, c.embedding_dim, embedding_name=c.name), 10, length_name="n")  # noqa: E501
        for c in (item, category)
    ]  # fmt: skip
    features = [SparseFeat("user", 100, embedding_dim=10), item, category, DenseFeat("score", 1), *history]

    def inputs(batch: int) -> tuple[Tensor]:
        generator = seeded(batch)
        ids = [torch.randint(1, rows, (batch, 1), generator=generator) for rows in (100, ROWS, 50)]
        score = torch.randn(batch, 1, generator=generator)
        items, kinds = (torch.randint(1, rows, (batch, 10), generator=generator) for rows in (ROWS, 50))
        length = torch.randint(0, 11, (batch, 1), generator=generator)
        return (torch.cat([*(i.float() for i in ids), score, items.float(), length.float(), kinds.float()], 1),)

    return larger(din(features, ["item", "cate"], dnn_hidden_units=(32, 16), att_weight_normalization=True)), inputs


def gpt2() -> tuple[nn.Module, Inputs]:
    """A sequence recommender: GPT-2's body over item ids, scores of the next item at every position."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=ROWS, n_positions=32, n_embd=32, n_layer=2, n_head=2, use_cache=False)
    return GPT2LMHeadModel(config), lambda batch: {
        "input_ids": torch.randint(0, ROWS, (batch, 20), generator=seeded(batch)),
    }


def bert() -> tuple[nn.Module, Inputs]:
    """BERT4Rec's body: a masked-item encoder with padding."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=ROWS, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip

    def inputs(batch: int) -> dict[str, Tensor]:
        generator = seeded(batch)
        lengths = torch.randint(1, 21, (batch, 1), generator=generator)
        ids = torch.randint(0, ROWS, (batch, 20), generator=generator)
        return {"input_ids": ids, "attention_mask": (torch.arange(20) < lengths).long()}

    return BertForMaskedLM(config), inputs


def llama() -> tuple[nn.Module, Inputs]:
    """A sequence recommender with rotary positions and two queries to a key."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=ROWS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), lambda batch: {
        "input_ids": torch.randint(0, ROWS, (batch, 20), generator=seeded(batch)),
    }


def t5() -> tuple[nn.Module, Inputs]:
    """Generative retrieval (TIGER): a padded history is read, the codes of the next item are scored."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=ROWS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, use_cache=False)

    def inputs(batch: int) -> dict[str, Tensor]:
        generator = seeded(batch)
        lengths = torch.randint(1, 21, (batch, 1), generator=generator)
        ids, codes = (torch.randint(0, ROWS, (batch, steps), generator=generator) for steps in (20, 4))
        return {"input_ids": ids, "attention_mask": (torch.arange(20) < lengths).long(), "decoder_input_ids": codes}

    return T5ForConditionalGeneration(config), inputs


def torchfm_fm() -> tuple[nn.Module, Inputs]:
    """A factorisation machine without a deep part, whose offsets are an array of numpy's."""
    from torchfm.model.fm import FactorizationMachineModel

    sizes = [ROWS + i for i in range(FEATURES)]

    def inputs(batch: int) -> tuple[Tensor]:
        return (torch.randint(0, ROWS, (batch, FEATURES), generator=seeded(batch)),)

    return FactorizationMachineModel(sizes, WIDTH), inputs


def rechub_features() -> tuple[list[Any], Any, Any]:
    """Features of torch_rechub's: ids, a padded history whose masked mean is read, and the item that it is of."""
    from torch_rechub.basic.features import SequenceFeature, SparseFeature

    item = SparseFeature("item", ROWS, WIDTH)
    history = SequenceFeature("history", ROWS, WIDTH, pooling="mean", shared_with="item", padding_idx=0)
    return [SparseFeature(f"f{i}", ROWS + i, WIDTH) for i in range(FEATURES)], history, item


def rechub_inputs(batch: int) -> tuple[dict[str, Tensor]]:
    generator = seeded(batch)
    given = {f"f{i}": torch.randint(0, ROWS, (batch,), generator=generator) for i in range(FEATURES)}
    lengths = torch.randint(1, 11, (batch, 1), generator=generator)
    history = torch.randint(1, ROWS, (batch, 10), generator=generator) * (torch.arange(10) < lengths)
    return ({**given, "history": history, "item": history[:, 0]},)


def rechub_mmoe() -> tuple[nn.Module, Inputs]:
    from torch_rechub.models.multi_task import MMOE

    towers = [{"dims": [8]}, {"dims": [8]}]
    features, *_ = rechub_features()
    return MMOE(features, ["classification", "regression"], 3, {"dims": [16]}, towers), rechub_inputs


def rechub_youtube_dnn() -> tuple[nn.Module, Inputs]:
    """The user's tower alone."""
    from torch_rechub.models.matching import YoutubeDNN

    features, history, item = rechub_features()
    model = YoutubeDNN([*features, history], [item], [], {"dims": [32, WIDTH]})
    model.mode = "user"
    return model, rechub_inputs


def rechub_narm() -> tuple[nn.Module, Inputs]:
    """A packed GRU over the session. The model itself wants a session of full length in every batch."""
    from torch_rechub.basic.features import SequenceFeature
    from torch_rechub.models.matching.narm import NARM

    def inputs(batch: int) -> tuple[dict[str, Tensor]]:
        (given,) = rechub_inputs(batch)
        given["history"][0] = torch.arange(1, 11)
        return ({"history": given["history"]},)

    return NARM(SequenceFeature("history", ROWS, WIDTH, pooling="concat", padding_idx=0), 16, 0.1, 0.1), inputs


FLAT = "the sums run over features and width at once, so every number is a feature of its own"
VECTOR = "the cross layer weighs by one vector (DCN, 2017); only the matrix form has a kernel"
ONE = f"{FEATURES} look-ups of {FEATURES} tables -> 1"

MODELS = (
    ThirdParty("torchrec-dlrm", "torchrec", torchrec_dlrm, (ONE,), ("bag-dot",), built=True),
    ThirdParty("torchrec-dlrm-dcn", "torchrec", torchrec_dlrm_dcn, (ONE,), ("cross",) * 3),
    ThirdParty("torchrec-deepfm", "torchrec", torchrec_deepfm, (ONE,), missed=(("bag-fm", FLAT),)),
    ThirdParty("torchrec-sequence", "torchrec", torchrec_sequence),
    ThirdParty("deepctr-deepfm", "deepctr_torch", lambda: deepctr_model("DeepFM"), (ONE, ONE), ("bag-fm",)),
    ThirdParty("deepctr-nfm", "deepctr_torch", lambda: deepctr_model("NFM"), (ONE, ONE), ("bag-fm",)),
    ThirdParty(
        "deepctr-dcn-matrix",
        "deepctr_torch",
        lambda: deepctr_model("DCN", cross_parameterization="matrix"),
        (ONE, ONE),
        ("cross",) * 2,
    ),
    ThirdParty(
        "deepctr-dcn-vector",
        "deepctr_torch",
        lambda: deepctr_model("DCN", cross_parameterization="vector"),
        (ONE, ONE),
        missed=(("cross", VECTOR),),
    ),
    ThirdParty(
        "deepctr-xdeepfm", "deepctr_torch", lambda: deepctr_model("xDeepFM", cin_layer_size=(16, 8)), (ONE, ONE)
    ),
    ThirdParty("deepctr-pnn", "deepctr_torch", deepctr_pnn, (ONE,), ("bag-dot",)),
    ThirdParty("deepctr-autoint", "deepctr_torch", lambda: deepctr_model("AutoInt"), (ONE, ONE), ("attention",) * 3),
    ThirdParty(
        "deepctr-din", "deepctr_torch", deepctr_din, ("3 look-ups of 3 tables -> 1",), ("activation-unit",), built=True
    ),
    ThirdParty("torchfm-fm", "torchfm", torchfm_fm, fused=("bag-fm",)),
    ThirdParty("rechub-mmoe", "torch_rechub", rechub_mmoe, (ONE,)),
    ThirdParty("rechub-youtube-dnn", "torch_rechub", rechub_youtube_dnn, (ONE, "look-up and pooling")),
    ThirdParty("rechub-narm", "torch_rechub", rechub_narm, built=True),
    ThirdParty("transformers-gpt2", "transformers", gpt2, fused=("attention",) * 2, built=True),
    ThirdParty("transformers-bert", "transformers", bert, fused=("attention",) * 2),
    ThirdParty(
        "torchrec-dlrm-transformer",
        "torchrec",
        torchrec_dlrm_transformer,
        (ONE,),
        ("attention",) * 2,
        slow=True,
    ),
    ThirdParty("deepctr-afm", "deepctr_torch", deepctr_afm, (ONE, ONE), slow=True),
    ThirdParty("deepctr-fibinet", "deepctr_torch", lambda: deepctr_model("FiBiNET"), (ONE, ONE), slow=True),
    ThirdParty("transformers-llama", "transformers", llama, fused=("attention",) * 2, slow=True),
    ThirdParty("transformers-t5", "transformers", t5, fused=("attention",) * 6, slow=True),
)
