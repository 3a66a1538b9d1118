"""Search for likely answers: beam search, and a small Monte Carlo tree search.

Why likely answers: with preference optimisation the logits of a language model are the optimal soft action values of
a token-level decision process, up to a term of the state (Rafailov et al., 2024, "From r to Q*"). Whatever is searched
for with reward and value then is what has the highest likelihood: for any number of further tokens

    arg max  sum (r + beta log pi_ref) + V(s_K)   =   arg max  V(s_0) + beta sum log pi,

so beam search on the tuned policy is guided decoding with the true value. `mcts` searches with the
left side and `beam_search` with the right one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import UsageError
from guerdon.policies.decoders import open_decoder
from guerdon.policies.language import LanguagePolicy, Prompt

# --- beams ------------------------------------------------------------------------------------------------


@torch.no_grad()
def beam_search(
    policy: LanguagePolicy,
    prompts: Sequence[Prompt],
    beams: int,
    max_new_tokens: int | None = None,
    *,
    length_penalty: float = 0.0,
    min_new_tokens: int = 0,
    every_beam: bool = False,
) -> Trajectories:
    """The likeliest answers that ``beams`` parallel beginnings a prompt find, at temperature 1.

    An answer's score is its total log-probability, end-of-text token included, divided by its number of tokens to the
    power ``length_penalty`` (0: not divided; 1: the mean, which many libraries take by default). At each token the
    ``2 beams`` best continuations of all beams are looked at: an end of text among the best ``beams`` of them is an
    answer, the best ``beams`` that do not end are continued. A prompt is done when its ``beams`` best answers cannot be
    beaten by what is still open, or at ``max_new_tokens``, where everything open counts as an answer.

    transformers' ``generate(num_beams=beams, length_penalty=0.0)`` finds the same answers. It differs with another
    penalty: for a positive one it stops, unless ``early_stopping="never"``, once the open beams are worse at their
    present length, though they may become better; here they are compared at the length where they could be best.

    Args:
        prompts: ``B`` texts or conversations.
        beams: 1 is greedy decoding that goes on past an end of text that is not worth it.
        max_new_tokens: the policy's own limit, unless given.
        min_new_tokens: tokens before which an answer does not end.
        every_beam: return all answers found, the best first, instead of the best of each prompt.

    Returns trajectories with ``group`` the number of the prompt and ``outputs["score"] [B]``.
    """
    limit = policy.max_new_tokens if max_new_tokens is None else max_new_tokens
    if beams < 1 or limit < 1 or min_new_tokens > limit:
        raise UsageError(
            f"a search with {beams} beams for {min_new_tokens} to {limit} tokens finds nothing; "
            "give at least one beam and one token"
        )
    if not len(prompts):
        raise UsageError("there is nothing to search: the list of prompts is empty")
    texts = [policy.render(prompt) for prompt in prompts]
    ids = [tuple(policy.tokens(text)) for text in texts]
    unique = sorted(set(ids), key=lambda row: (len(row), row))
    pools = _search(policy, unique, beams, limit, length_penalty, min_new_tokens)
    found = dict(zip(unique, pools, strict=True))
    rows = [(i, answer) for i, row in enumerate(ids) for answer in found[row][: None if every_beam else 1]]
    answers = [answer.tokens for _, answer in rows]
    traj = policy.collate(
        [ids[i] for i, _ in rows], answers, ([texts[i] for i, _ in rows], _decode(policy, answers))
    )
    outputs = traj.outputs
    assert outputs is not None
    outputs["score"] = torch.tensor([answer.score for _, answer in rows], device=traj.mask.device)
    log_prob = torch.zeros_like(traj.log_prob)
    for row, (_, answer) in enumerate(rows):
        log_prob[row, : len(answer.tokens)] = torch.tensor(answer.log_prob)
    group = torch.tensor([i for i, _ in rows], device=traj.mask.device)
    return traj.with_(log_prob=log_prob, group=group, outputs=outputs)


def _decode(policy: LanguagePolicy, answers: Sequence[Sequence[int]]) -> list[str]:
    end = policy.tokenizer.eos_token_id
    spoken = [[token for token in answer if token != end] for answer in answers]
    return [policy.tokenizer.decode(answer, skip_special_tokens=True) for answer in spoken]


@dataclass
class _Answer:
    tokens: list[int]
    log_prob: list[float]
    score: float


def _search(
    policy: LanguagePolicy,
    prompts: Sequence[tuple[int, ...]],
    beams: int,
    limit: int,
    length_penalty: float,
    min_new_tokens: int,
) -> list[list[_Answer]]:
    """The best answers to each prompt, the best first. ``U`` is the number of prompts that are still open."""
    end = int(policy.tokenizer.eos_token_id)
    decoder = open_decoder(policy.model, prompts, range(len(prompts)), limit)
    pools: list[list[_Answer]] = [[] for _ in prompts]
    number = list(range(len(prompts)))  # of the prompts that are still open
    logits = decoder.start()
    device = logits.device
    score = torch.zeros(len(prompts), 1, device=device)  # of the beams, [U, k]
    token = torch.zeros(len(prompts), 1, 0, dtype=torch.int64, device=device)  # [U, k, t]
    each = torch.zeros(len(prompts), 1, 0, device=device)  # log-probability of each token, [U, k, t]
    for t in range(limit):
        log_p = policy.restrict(logits.float()).log_softmax(-1)
        if t < min_new_tokens:
            log_p[:, end] = -torch.inf
        log_p = log_p.unflatten(0, score.shape)
        total = (score[..., None] + log_p).flatten(1)
        best = total.topk(min(2 * beams, total.shape[1]), dim=1)  # [U, m]
        beam, new = best.indices // log_p.shape[-1], best.indices % log_p.shape[-1]
        token = torch.cat([_pick(token, beam), new[..., None]], dim=2)
        each = torch.cat([_pick(each, beam), log_p.flatten(1).gather(1, best.indices)[..., None]], dim=2)
        ends = new == end if t + 1 < limit else torch.ones_like(new, dtype=torch.bool)
        worth = (t + 1) ** length_penalty
        for u, m in (ends & best.values.isfinite())[:, :beams].nonzero().tolist():
            answer = _Answer(token[u, m].tolist(), each[u, m].tolist(), best.values[u, m].item() / worth)
            pools[number[u]].append(answer)
        open_score = best.values.masked_fill(ends, -torch.inf)
        score, place = open_score.topk(min(beams, open_score.shape[1]), dim=1)
        hope = (limit if length_penalty > 0 else t + 1) ** length_penalty
        going = []
        for u, top in enumerate((score[:, 0] / hope).tolist()):
            pool = pools[number[u]]
            pool.sort(key=lambda answer: -answer.score)
            del pool[beams:]
            if top > -math.inf and (len(pool) < beams or top > pool[-1].score):
                going.append(u)
        if not going:
            break
        kept = torch.tensor(going, device=device)
        number = [number[u] for u in going]
        old = log_p.shape[1]  # beams of each prompt before this token
        rows = (kept[:, None] * old + beam[kept].gather(1, place[kept])).flatten()
        score, place = score[kept], place[kept]
        token, each = _pick(token[kept], place), _pick(each[kept], place)
        decoder.keep(rows)
        logits = decoder.step(token[..., -1].flatten())
    return pools


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """``values [U, k, t]`` at ``index [U, m]`` of the second axis."""
    return values.gather(1, index[..., None].expand(*index.shape, values.shape[2]))


# --- a tree -----------------------------------------------------------------------------------------------


@dataclass
class Node:
    """A beginning of an answer.

    Args:
        tokens: the answer so far.
        log_prob: of the last token under the policy.
        sum: of ``r + beta log pi_ref`` over the tokens.
        value: ``V``, read from the logits as ``beta logsumexp``; 0 where the answer ends.
        reward: ``r`` of the last token: the caller's, or the one that the logits imply.
        ended: whether the answer is complete.
        best: the largest ``sum + value`` among the leaves below.
        visits: simulations that went through.
        children: by token, those that were opened.
        q: ``[V]``, the action values of the next tokens, ``beta`` times the logits.
    """

    tokens: list[int]
    log_prob: float = 0.0
    sum: float = 0.0
    value: float = 0.0
    reward: float = 0.0
    ended: bool = False
    best: float = -math.inf
    visits: int = 0
    children: dict[int, Node] = field(default_factory=dict)
    q: Tensor = field(default_factory=lambda: torch.empty(0))
    log_p: Tensor = field(default_factory=lambda: torch.empty(0))
    log_reference: Tensor = field(default_factory=lambda: torch.empty(0))


@torch.no_grad()
def mcts(
    policy: LanguagePolicy,
    reference: LanguagePolicy,
    prompt: Prompt,
    simulations: int,
    beta: float = 0.1,
    *,
    max_new_tokens: int | None = None,
    reward: Callable[[list[int]], float] | None = None,
    exploration: float = 0.0,
) -> tuple[Trajectories, Node]:
    """Tree search for the answer with the highest ``sum (r + beta log pi_ref)``, values read from the policy's logits.

    A simulation goes down the tree to the most promising leaf and opens it. A leaf counts ``sum + V``; a token that was
    never tried counts what its logit says, ``Q = beta l``; a parent counts as its best leaf. Of the children, that with
    the largest ``best / beta + exploration pi(a) sqrt(visits) / (1 + its visits)`` is taken (the rule of AlphaZero, in
    nats). With ``exploration`` 0 this is best-first search: where the values are right, the first complete answer that
    it reaches is the best of all.

    Without ``reward`` the implied one is used, ``r = Q - beta log pi_ref - V(next)``, and the search is one for the
    likeliest answer. One forward pass of each model an opened leaf, nothing cached: for small trees.

    Args:
        policy, reference: the tuned policy and the one that it was tuned from.
        beta: strength of the KL anchor with which it was tuned.
        reward: the reward of the last token of an answer so far (token ids), if it is known.

    Returns the best answer as a trajectory of one row, with ``outputs["score"]`` its sum, and the tree. An answer that
    the simulations left open is completed by the likeliest tokens.
    """
    if simulations < 1 or beta <= 0:
        raise UsageError(f"{simulations} simulations with beta {beta:g} find nothing; both must be positive")
    limit = policy.max_new_tokens if max_new_tokens is None else max_new_tokens
    text = policy.render(prompt)
    start = policy.tokens(text)
    end = int(policy.tokenizer.eos_token_id)

    def read(node: Node) -> None:
        """Fill in what the models say at a node."""
        if not node.ended:
            logits = _next_logits(policy, start + node.tokens)
            node.q, node.log_p = beta * logits, logits.log_softmax(-1)
            node.log_reference = _next_logits(reference, start + node.tokens).log_softmax(-1)
            node.value = beta * float(logits.logsumexp(-1))
        node.best = node.sum + node.value

    def open_child(parent: Node, token: int) -> Node:
        tokens = [*parent.tokens, token]
        child = Node(tokens, float(parent.log_p[token]), ended=token == end or len(tokens) == limit)
        read(child)
        anchor = beta * float(parent.log_reference[token])
        child.reward = float(parent.q[token]) - anchor - child.value if reward is None else reward(tokens)
        child.sum = parent.sum + child.reward + anchor
        child.best = child.sum + child.value
        parent.children[token] = child
        return child

    def promise(node: Node) -> Tensor:
        """``[V]``: the best leaf behind each next token."""
        best = node.sum + node.q
        for token, child in node.children.items():
            best[token] = child.best
        return best

    root = Node([])
    read(root)
    for _ in range(simulations):
        path = [root]
        while not path[-1].ended:
            node = path[-1]
            visits = torch.zeros_like(node.q)
            for token, child in node.children.items():
                visits[token] = child.visits
            bonus = exploration * node.log_p.exp() * math.sqrt(max(node.visits, 1)) / (1 + visits)
            token = int((promise(node) / beta + bonus).argmax())
            known = node.children.get(token)
            path.append(known or open_child(node, token))
            if known is None:
                break
        for node in path:
            node.visits += 1
        for node in reversed(path[:-1]):
            node.best = float(promise(node).max())
        if path[-1].ended and exploration == 0 and path[-1].visits > 1:
            break  # the best leaf is complete: nothing that is open can beat it
    node = root
    while not node.ended:
        token = int(promise(node).argmax())
        node = node.children.get(token) or open_child(node, token)
    traj = policy.collate([start], [node.tokens], ([text], _decode(policy, [node.tokens])))
    outputs = traj.outputs
    assert outputs is not None
    outputs["score"] = torch.tensor([node.sum], device=traj.mask.device)
    log_prob = _path_log_prob(root, node.tokens)
    return traj.with_(log_prob=log_prob[None].to(traj.mask.device), outputs=outputs), root


def _next_logits(policy: LanguagePolicy, tokens: Sequence[int]) -> Tensor:
    """``[V]`` float64 logits of the next token, minus infinity where it is not allowed."""
    ids = torch.tensor([list(tokens)], device=next(policy.model.parameters()).device)
    return policy.restrict(policy.model(input_ids=ids, use_cache=False).logits[0, -1].double()).cpu()


def _path_log_prob(root: Node, tokens: Sequence[int]) -> Tensor:
    """``[T]`` log-probabilities of the tokens along a path of the tree."""
    node, found = root, []
    for token in tokens:
        node = node.children[token]
        found.append(node.log_prob)
    return torch.tensor(found)
