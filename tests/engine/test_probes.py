"""Floor 1: the probe set and the engine. One sequence at a time through the plain model is the reference."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from benchmarks import bench
from lddyn import InputError
from lddyn.data.responses import RESPONSE_TYPES
from lddyn.engine import probes, store
from lddyn.engine.probe_set import Encoded, ProbeSet
from lddyn.engine.probes import greedy, measure, per_token, sample
from lddyn.theory.influence import normalization

VOCAB = 300
AUTHORS = Path(__file__).parents[3] / "shared/data/authors/formal_prob_train.jsonl"
WORDS = ["the cat sat on the mat and the dog ran", "question: why is the sky blue? answer: the air scatters light"]


def tiny(family="gpt_neox", **changes):
    """A random model that reacts strongly to its input."""
    torch.manual_seed(0)
    size = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    size |= dict(max_position_embeddings=128, initializer_range=0.2, bos_token_id=0, eos_token_id=0)
    config = {
        "gpt_neox": lambda: GPTNeoXConfig(**size | dict(intermediate_size=64) | changes),
        "llama": lambda: LlamaConfig(**size | dict(intermediate_size=64, num_key_value_heads=2) | changes),
        "qwen2": lambda: Qwen2Config(**size | dict(intermediate_size=64, num_key_value_heads=2) | changes),
        "gpt2": lambda: GPT2Config(**size | changes),
        "opt": lambda: OPTConfig(**size | dict(ffn_dim=64, word_embed_proj_dim=32, init_std=0.2) | changes),
    }[family]()
    return AutoModelForCausalLM.from_config(config).eval()


def random_encoded(prompts=5, kinds=("chosen", "rejected", "unrelated"), longest=30):
    generator = torch.Generator().manual_seed(1)

    def text(low, high):
        length = torch.randint(low, high, (1,), generator=generator).item()
        return torch.randint(VOCAB, (length,), generator=generator).tolist()

    heads = [text(3, 20) for _ in range(prompts)]
    return Encoded([f"p{i}" for i in range(prompts)], heads, {k: [text(1, longest) for _ in heads] for k in kinds})


@torch.no_grad()
def reference(model, prompt, response):
    """log pi(. | prompt, response so far) at each token of the response, one sequence at a time. (tokens, V)"""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(-1)


def values(table, metric):
    rows = table[table.metric == metric]
    return dict(zip(zip(rows.prompt_id, rows.response_type, strict=True), rows.value, strict=True))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_of):
    return tokenizer_of(WORDS * 5, "<|end|>", vocab_size=VOCAB)


# --- the engine --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen2", "gpt2", "opt"])
def test_sharing_a_prompt_does_not_change_logps(family, attention):
    model, encoded = tiny(family), random_encoded()
    model.set_attn_implementation(attention)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # falling back would warn
        table = measure(model, encoded, batch_tokens=100)
    assert model.config._attn_implementation == attention
    sums, best, lengths = (values(table, m) for m in ("logp_sum", "argmax_logp_sum", "tokens"))
    for kind, responses in encoded.responses.items():
        for name, prompt, response in zip(encoded.prompt_ids, encoded.prompts, responses, strict=True):
            logp = reference(model, prompt, response)
            tolerance = 1e-4 * len(response)
            assert lengths[name, kind] == len(response)
            expected = logp.gather(1, torch.tensor(response)[:, None]).sum().item()
            assert sums[name, kind] == pytest.approx(expected, abs=tolerance)
            assert best[name, kind] == pytest.approx(logp.amax(1).sum().item(), abs=tolerance)


def test_y_star_is_measured_along_the_response_it_belongs_to():
    """The authors' evaluation kept the arg max of the last response type, for all of them (their issue 2)."""
    model, encoded = tiny(), random_encoded(kinds=("chosen", "rejected", "test_shuffled"))
    table = measure(model, encoded)
    best, own = values(table, "argmax_logp_sum"), values(table, "logp_sum")
    for i, name in enumerate(encoded.prompt_ids):
        paths = {k: reference(model, encoded.prompts[i], r[i]).amax(1).sum() for k, r in encoded.responses.items()}
        for kind, on_own_path in paths.items():
            assert best[name, kind] == pytest.approx(on_own_path.item(), abs=1e-3)
            assert best[name, kind] >= own[name, kind]
        assert abs(best[name, "chosen"] - paths["test_shuffled"].item()) > 1
    alone = measure(model, encoded._replace(responses={"chosen": encoded.responses["chosen"]}))
    assert values(alone, "argmax_logp_sum") == pytest.approx({k: v for k, v in best.items() if k[1] == "chosen"})


def test_padding_and_batches_do_not_change_logps():
    model, encoded = tiny(), random_encoded()
    tables = [measure(model, encoded, batch_tokens=n).value for n in (1, 60, 10**6)]
    tables.append(measure(model, encoded, share=False).value)
    for other in tables[1:]:
        np.testing.assert_allclose(other, tables[0], rtol=1e-4, atol=1e-4)


def test_metrics_are_what_their_names_say():
    model, encoded = tiny(), random_encoded(prompts=1)
    table = measure(model, encoded)
    assert list(table.columns) == ["prompt_id", "response_type", "metric", "value"]
    response = encoded.responses["chosen"][0]
    logp = reference(model, encoded.prompts[0], response)
    p, n = logp.exp(), len(response)
    own = logp.gather(1, torch.tensor(response)[:, None])
    rest = logp.scatter(1, logp.argmax(1, keepdim=True), -torch.inf).logsumexp(1)
    expected = {
        "logp_sum": own.sum(),
        "logp_mean": own.mean(),
        "argmax_logp_sum": logp.amax(1).sum(),
        "argmax_logp_mean": logp.amax(1).mean(),
        "rest_logp_sum": rest.sum(),
        "entropy_mean": -(p * logp).sum(1).mean(),
        "sq_norm_mean": p.square().sum(1).mean(),
        "a_norm_mean": normalization(p).norm(dim=(1, 2)).mean(),
        "residual_norm_mean": (p - torch.nn.functional.one_hot(torch.tensor(response), VOCAB)).norm(dim=1).mean(),
        "rank_mean": (logp > own).sum(1).double().mean(),
        "tokens": torch.tensor(n),
    }
    measured = {m: values(table, m)["p0", "chosen"] for m in table.metric.unique()}
    assert measured == pytest.approx({m: v.item() for m, v in expected.items()}, rel=1e-5, abs=1e-5)


def test_measurements_pass_the_invariants_of_a_record():
    table = measure(tiny(), random_encoded())
    store.check(table.assign(step=0, examples=0)[store.COLUMNS])


def test_two_thousand_tokens_do_not_overflow():
    model = tiny(max_position_embeddings=2100, initializer_range=2.0)
    generator = torch.Generator().manual_seed(2)
    response = torch.randint(VOCAB, (2000,), generator=generator).tolist()
    encoded = Encoded(["p0"], [[5, 6, 7]], {"chosen": [response]})
    table = measure(model, encoded)
    assert np.isfinite(table.value).all()
    logp = reference(model, [5, 6, 7], response).gather(1, torch.tensor(response)[:, None])
    assert values(table, "logp_sum")["p0", "chosen"] == pytest.approx(logp.sum().item(), rel=1e-5)


def test_bf16_model_is_probed_without_sharing_errors():
    model, encoded = tiny().bfloat16(), random_encoded()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = measure(model, encoded)
    plain = measure(model, encoded, share=False)
    for metric in ("logp_mean", "argmax_logp_mean", "entropy_mean"):
        assert values(table, metric) == pytest.approx(values(plain, metric), abs=0.1)


class Scaled(GPTNeoXForCausalLM):
    """Does more to its logits than its output layer."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_model_does_after_its_output_layer_counts(dtype):
    model = Scaled(tiny().config).to(dtype).eval()
    encoded = random_encoded()
    table = measure(model, encoded)
    logp = reference(model, encoded.prompts[0], encoded.responses["chosen"][0])
    expected = logp.gather(1, torch.tensor(encoded.responses["chosen"][0])[:, None]).sum().item()
    assert values(table, "logp_sum")["p0", "chosen"] == pytest.approx(expected, abs=1e-3)


def test_model_that_ignores_positions_falls_back(monkeypatch):
    """Any disagreement counts, not only an exception."""
    model = tiny()
    monkeypatch.setattr(probes, "_rows_of", lambda cache, rows: probes.DynamicCache())  # loses the prompt
    with pytest.warns(UserWarning, match="cannot share a prompt"):
        table = measure(model, random_encoded())
    monkeypatch.undo()
    np.testing.assert_allclose(table.value, measure(tiny(), random_encoded()).value, rtol=1e-4, atol=1e-4)


def test_ways_are_checked_again_for_longer_texts_and_when_weights_have_moved(monkeypatch):
    model, calls = tiny(), []
    check = probes._verified
    monkeypatch.setattr(probes, "_verified", lambda *a: calls.append(1) or check(*a))
    for longest in (10, 10, 30, 10):
        measure(model, random_encoded(longest=longest))
    assert len(calls) == 2
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.weight.mul_(1.05)
    measure(model, random_encoded(longest=10))
    assert len(calls) == 2
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.weight.mul_(1.5)
    measure(model, random_encoded(longest=10))
    assert len(calls) == 3


def test_probing_leaves_training_bit_identical(tokenizer):
    def train(probe):
        model = tiny(hidden_dropout=0.1, attention_dropout=0.1).train()
        model.gpt_neox.layers[0].eval()  # someone's frozen block
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(3)
        for _ in range(3):
            optimizer.zero_grad()
            ids = torch.randint(VOCAB, (2, 12))
            model(input_ids=ids, labels=ids).loss.backward()
            if probe:
                measure(model, random_encoded())
                greedy(model, tokenizer, ["the cat"], 3)
                sample(model, tokenizer, ["the cat"], 3, seed=0)
                assert model.training and not model.gpt_neox.layers[0].training and torch.is_grad_enabled()
            optimizer.step()
        return [p.detach().clone() for p in model.parameters()], torch.get_rng_state()

    (plain, state), (probed, state_after) = train(False), train(True)
    assert torch.equal(state, state_after)
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))


def test_error_while_probing_restores_training_mode(monkeypatch):
    model = tiny().train()
    monkeypatch.setattr(probes, "_computed", None)
    with pytest.raises(TypeError):
        measure(model, random_encoded())
    assert model.training and torch.is_grad_enabled()


def test_text_that_does_not_fit_the_model_is_named():
    encoded = Encoded(["p7"], [[1] * 100], {"chosen": [[2] * 29]})
    with pytest.raises(InputError, match=r"prompt 'p7' with chosen has 129 tokens, the model takes 128"):
        measure(tiny(), encoded)
    with pytest.raises(InputError, match=r"token 300, the model knows 300"):
        measure(tiny(), Encoded(["p7"], [[1]], {"chosen": [[VOCAB]]}))


def test_tokens_add_up_to_the_response(tokenizer):
    model = tiny()
    texts = {"chosen": ["the cat sat", "a dog"], "rejected": ["blue light scatters", "why"]}
    encoded = ProbeSet(["question: why?", "the mat"], texts, ["a", "b"]).encode(tokenizer)
    table, sums = per_token(model, tokenizer, encoded, "b"), measure(model, encoded)
    for kind, rows in table.groupby("response_type"):
        assert "".join(rows.token) == f" {texts[kind][1]}<|end|>"
        assert list(rows.position) == list(range(len(rows)))
        assert rows.logp.sum() == pytest.approx(values(sums, "logp_sum")["b", kind], abs=1e-4)
        assert ((rows["rank"] == 0) == (rows.token == rows["argmax"])).all()
    with pytest.raises(InputError, match="unknown prompt_id 'c'"):
        per_token(model, tokenizer, encoded, "c")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_agrees_with_cpu(dtype):
    encoded = random_encoded()
    cpu, cuda = (measure(tiny().to(device, dtype), encoded) for device in ("cpu", "cuda"))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    assert values(cuda, "logp_mean") == pytest.approx(values(cpu, "logp_mean"), abs=tolerance)


def test_bench_compares_equal_numbers():
    model, encoded = bench.random_model("built-in"), bench.random_probes(2048, 2, (5, 9), (1, 9))
    results = [way(model, encoded) for way in bench.WAYS.values()]
    for key in results[0]:
        for other in results[1:]:
            assert other[key][:2] == pytest.approx(results[0][key][:2], abs=1e-4)


# --- the probe set -----------------------------------------------------------------------------------------


def test_leading_space_and_end_of_text_are_the_same_for_all_types(tokenizer):
    texts = {"chosen": [" the cat"], "chosen_semantic": ["the cat"], "unrelated": ["\n the cat "]}
    encoded = ProbeSet(["why?"], texts).encode(tokenizer)
    ids = [encoded.responses[kind][0] for kind in texts]
    assert ids[0] == ids[1] == ids[2]
    assert tokenizer.decode(ids[0]) == " the cat<|end|>"
    after_space = ProbeSet(["why? "], texts).encode(tokenizer)
    assert tokenizer.decode(after_space.prompts[0] + after_space.responses["chosen"][0]) == "why? the cat<|end|>"


def test_prompt_keeps_its_end_and_response_its_start(tokenizer):
    text = "the cat sat on the mat and the dog ran"
    whole = ProbeSet([text], {"chosen": [text]}).encode(tokenizer)
    cut = ProbeSet([text], {"chosen": [text]}).encode(tokenizer, max_prompt=4, max_response=5)
    assert cut.prompts[0] == whole.prompts[0][-4:]
    assert cut.responses["chosen"][0] == whole.responses["chosen"][0][:5]
    assert whole.responses["chosen"][0][-1] == tokenizer.eos_token_id not in cut.responses["chosen"][0]


def test_beginning_of_text_is_there_only_if_the_tokenizer_adds_it(tokenizer):
    plain = ProbeSet(["the cat sat"], {"chosen": ["on"]}).encode(tokenizer)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>"])
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    with_start = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|end|>")
    encoded = ProbeSet(["the cat sat"], {"chosen": ["on"]}).encode(with_start)
    assert encoded.prompts[0] == [start, *plain.prompts[0]]
    assert encoded.responses == plain.responses
    cut = ProbeSet(["the cat sat"], {"chosen": ["on"]}).encode(with_start, max_prompt=2)
    assert cut.prompts[0] == [start, plain.prompts[0][-1]]


def test_tokenizer_without_end_of_text_is_refused(tokenizer):
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no end-of-text token"):
        ProbeSet(["a"], {"chosen": ["b"]}).encode(without)


GOOD = {"prompt": "why?", "chosen": "because", "rejected": "no"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "invalid JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps({"chosen": "a"}), "no field 'prompt'"),
        (json.dumps({"prompt": "a", "chosen": "b"}), "no field 'rejected'"),
        (json.dumps(GOOD | {"rejected": "  "}), "rejected is empty"),
        (json.dumps(GOOD | {"chosen": 3}), "chosen is of type int, not a text"),
        (json.dumps(GOOD | {"rejected": " because"}), "chosen and rejected are equal"),
        (json.dumps(GOOD | {"unrelated": "x"}), "field 'unrelated', which the first row does not have"),
    ],
)
def test_bad_row_is_named_with_file_and_line(tmp_path, row, message):
    path = tmp_path / "probes.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n{row}\n")
    with pytest.raises(InputError) as error:
        ProbeSet.from_jsonl(path)
    assert f"{path}, line 3: {message}" in str(error.value)


def test_missing_or_useless_file_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nothing\.jsonl: No such file"):
        ProbeSet.from_jsonl(tmp_path / "nothing.jsonl")
    (tmp_path / "a.jsonl").write_text('{"prompt": "why?", "chosen_selfr": "x"}\n')
    with pytest.raises(InputError, match=r"line 1: no response \(allowed: chosen, "):
        ProbeSet.from_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(GOOD | {"prompt_id": "x"}) for _ in "ab"))
    with pytest.raises(InputError, match=r"line 2: the id 'x' again, which .*line 1 has"):
        ProbeSet.from_jsonl(tmp_path / "b.jsonl")


def test_line_separator_inside_a_text_does_not_end_the_row(tmp_path):
    row = GOOD | {"chosen": "one\u2028two"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert ProbeSet.from_jsonl(tmp_path / "a.jsonl").responses["chosen"] == [" one\u2028two"]


def test_skipped_rows_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(["{", json.dumps(GOOD | {"id": 7}), json.dumps(GOOD | {"chosen": ""})]))
    with pytest.warns(UserWarning, match=r"skipped 2 bad rows; the first: .*line 1: invalid JSON"):
        probe_set = ProbeSet.from_jsonl(tmp_path / "a.jsonl", skip_bad_rows="rows")
    assert probe_set.prompt_ids == ["7"] and probe_set.prompts == ["why?"]


def test_authors_names_become_ours(tmp_path):
    row = GOOD | {"chosen_gptformat": "f", "reject_gptsemantic": "s", "irr_hum": "h", "chosen_selfr": "dropped"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    probe_set = ProbeSet.from_jsonl(tmp_path / "a.jsonl")
    assert list(probe_set.responses) == ["chosen", "chosen_format", "rejected", "rejected_semantic", "unrelated"]


@pytest.mark.skipif(not AUTHORS.exists(), reason="the authors' data is not here")
def test_the_authors_file_has_all_twelve_types():
    with pytest.raises(InputError, match="line 7: chosen_initial is empty"):
        ProbeSet.from_jsonl(AUTHORS)
    with pytest.warns(UserWarning, match="skipped 22 bad rows"):
        probe_set = ProbeSet.from_jsonl(AUTHORS, skip_bad_rows="rows")
    assert len(probe_set.prompts) == 478 and list(probe_set.responses) == list(RESPONSE_TYPES)


def test_unknown_type_and_uneven_lists_are_refused():
    with pytest.raises(InputError, match="did you mean 'chosen_format'"):
        ProbeSet(["a"], {"chosen_formal": ["b"]})
    with pytest.raises(InputError, match="1 prompts, but 2 chosen"):
        ProbeSet(["a"], {"chosen": ["b", "c"]})


# --- decoding ----------------------------------------------------------------------------------------------

PROMPTS = ["the cat sat on the mat", "why?", "question: why is the sky blue? answer:"]


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "qwen2", "gpt2", "opt"])
def test_greedy_agrees_with_generate_and_its_logp_with_measure(tokenizer, family):
    model = tiny(family)
    for prompt, decoded in zip(PROMPTS, greedy(model, tokenizer, PROMPTS, 8), strict=True):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        expected = model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert decoded.tokens == expected
        table = measure(model, Encoded(["p"], [ids[0].tolist()], {"chosen": [expected]}))
        assert decoded.logp == pytest.approx(values(table, "logp_sum")["p", "chosen"], abs=1e-3)


def test_greedy_stops_at_end_of_text(tokenizer):
    model = tiny()
    first = greedy(model, tokenizer, PROMPTS[:1], 4)[0].tokens
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[[0, first[1]]] = head[[first[1], 0]]  # the second token becomes end of text
    stopped, *others = greedy(model, tokenizer, PROMPTS, 4)
    assert stopped.tokens == [first[0], tokenizer.eos_token_id]
    assert stopped.text == tokenizer.decode(first[:1])
    assert [d.tokens for d in others] == [greedy(model, tokenizer, [p], 4)[0].tokens for p in PROMPTS[1:]]
    assert max(len(d.tokens) for d in others) == 4  # they go on when the first has ended


def test_sampling_depends_on_the_seed_only(tokenizer):
    model = tiny()
    torch.manual_seed(1)
    a = sample(model, tokenizer, PROMPTS, 6, seed=0)
    torch.manual_seed(2)
    b = sample(model, tokenizer, PROMPTS, 6, seed=0, batch_size=1)
    assert [d.tokens for d in a] == [d.tokens for d in b]
    assert [d.tokens for d in a] != [d.tokens for d in sample(model, tokenizer, PROMPTS, 6, seed=1)]


def test_samples_follow_the_models_distribution(tokenizer):
    model = tiny(initializer_range=0.5)
    logp = reference(model, tokenizer(PROMPTS[1]).input_ids, [1])[0]
    drawn = [d.tokens[0] for d in sample(model, tokenizer, [PROMPTS[1]] * 2000, 1, seed=0, batch_size=500)]
    frequency = np.bincount(drawn, minlength=VOCAB) / 2000
    assert np.abs(frequency - logp.exp().numpy()).max() < 0.05


def test_keys_and_values_are_passed_under_the_name_that_the_model_knows():
    class Old:
        def forward(self, input_ids, past_key_values=None): ...

    class New:
        def forward(self, input_ids, cache=None): ...

    assert (probes.cache_keyword(Old), probes.cache_keyword(New)) == ("past_key_values", "cache")
