"""The table of systems: every published method that guerdon holds or will hold, one row each.

The command line, the documentation and the tests read this table and nothing else. It must stay light:
``guerdon --help`` and ``guerdon list`` import it, so only the standard library may be imported here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from guerdon.errors import UsageError, nearest

if TYPE_CHECKING:
    from rich.console import Console

Status = Literal["ready", "planned"]

FAMILIES: dict[str, str] = {
    "online": "learns from its own experience",
    "preference": "learns from comparisons",
    "offline": "learns from recorded data and rewards",
    "imitation": "learns from demonstrations and take-overs",
    "reward": "learns the judge",
    "distillation": "learns from a teacher",
    "model_based": "learns with a known or learned model",
    "engine": "where the roles of a method run",
    "study": "surveys and diagnoses, as experiments over the other methods",
}
"""What each family learns from. The first seven are the folders of ``guerdon.methods``."""

POLICIES: dict[str, str] = {
    "categorical": "discrete actions, sampled or greedy over action values",
    "gaussian": "continuous actions: Gaussian, squashed or truncated",
    "deterministic": "continuous actions without noise of their own",
    "residual": "a correction on top of a frozen policy",
    "action_diffusion": "chunks of actions, denoised",
    "sequence": "transformers over histories, such as decision transformers",
    "tabular": "tables and log-linear policies with exact values",
    "language": "causal language models",
    "vision_language": "models over images and text",
    "diffusion": "image generators that denoise in many steps",
    "consistency": "image generators of one to a few steps",
    "video": "video generators",
    "reward_model": "models that judge",
    "encoder": "image classifiers and feature extractors",
}
"""The kinds of model that a system trains."""

STATUSES: dict[str, str] = {"ready": "can be trained now", "planned": "not written yet"}


@dataclass(frozen=True)
class System:
    """One published method (or, for an engine or a study, one published piece of work)."""

    slug: str
    title: str
    paper: int | None  # 1 to 74; None for a baseline
    reference: str  # "Oertell et al., 2024"
    arxiv: str  # "2404.03673"; empty if there is none
    family: str
    method: str | None  # the module that holds it
    cls: str | None  # the class in that module
    policies: tuple[str, ...]
    status: Status
    summary: str
    aliases: tuple[str, ...] = ()


def _row(
    family: str,
    slug: str,
    cls: str | None,
    reference: str,
    arxiv: str,
    title: str,
    policies: str,
    summary: str,
    *,
    paper: int | None = None,
    module: str | None = None,
    aliases: str = "",
    ready: bool = False,
) -> System:
    """Fill in what follows from the family and the slug: the module is named after the slug or an alias."""
    if family == "study":
        method = None
    elif family == "engine":
        method = f"guerdon.engine.{module or slug}"
    else:
        method = f"guerdon.methods.{family}.{module or slug}"
    return System(
        slug=slug,
        title=title,
        paper=paper,
        reference=reference,
        arxiv=arxiv,
        family=family,
        method=method,
        cls=cls,
        policies=tuple(policies.split()),
        status="ready" if ready else "planned",
        summary=summary,
        aliases=tuple(aliases.split()),
    )


SYSTEMS: tuple[System, ...] = (
    # ------------------------------------------------------------------ online: its own experience
    _row(
        "online", "rlcm", "RLCM", "Oertell et al., 2024", "2404.03673",
        "RL for Consistency Models: Faster Reward Guided Text-to-Image Generation",
        "consistency",
        "Clipped policy gradient on the few sampling steps of a consistency model",
        paper=1, ready=True,
    ),
    _row(
        "online", "copg", "CoPG", "Flet-Berliac et al., 2024", "2406.19185",
        "Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a supervised-friendly"
        " fashion",
        "language categorical gaussian",
        "Off-policy pairs: each answer's baseline is the other's regularised reward",
        paper=9, ready=True,
    ),
    _row(
        "online", "stream_x", "StreamQ", "Elsayed et al., 2024", "2410.14606",
        "Streaming Deep Reinforcement Learning Finally Works",
        "categorical",
        "Action values from each step once as it arrives: no replay, no batch, no target network",
        paper=10, module="stream_q", aliases="stream_q stream_sarsa", ready=True,
    ),
    _row(
        "online", "stream_ac", "StreamAC", "Elsayed et al., 2024", "",
        "Streaming Deep Reinforcement Learning Finally Works (actor-critic)",
        "categorical gaussian",
        "Actor and critic from each step once as it arrives",
        ready=True,
    ),
    _row(
        "online", "stream_td", "StreamTD", "Elsayed et al., 2024", "",
        "Streaming Deep Reinforcement Learning Finally Works (prediction)",
        "categorical gaussian",
        "Predicts the return of what is still to come from each step once as it arrives",
        ready=True,
    ),
    _row(
        "online", "cad2rl", "CAD2RL", "Sadeghi and Levine, 2017", "1611.04201",
        "CAD2RL: Real Single-Image Flight without a Single Real Image",
        "categorical",
        "Collision-free flight from one image, trained on randomised rendered corridors",
        paper=13,
    ),
    _row(
        "online", "pf_ppo", "PFPPO", "Shen and Zhang, 2024", "2409.06957",
        "Policy Filtration in RLHF to Fine-Tune LLM for Code Generation",
        "language",
        "PPO on the ranks of sampled answers at which the reward model can be trusted",
        paper=15,
    ),
    _row(
        "online", "rlgf", "RLGF", "Chang et al., 2023", "2306.11816",
        "Learning to Generate Better Than Your LLM",
        "language",
        "A guide model starts or finishes the learner's texts; PPO++, AggreVaTeD and LOLS",
        paper=21, aliases="ppo_plus_plus aggrevated lols d2lols",
    ),
    _row(
        "online", "tulu3", "RLVR", "Lambert et al., 2024", "2411.15124",
        "Tülu 3: Pushing Frontiers in Open Language Model Post-Training",
        "language",
        "Post-training recipe: curated SFT, length-normalised DPO, RL on verifiable rewards",
        paper=23, module="rlvr", aliases="rlvr",
    ),
    _row(
        "online", "prdp", "PRDP", "Deng et al., 2024", "2402.08714",
        "PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models",
        "diffusion",
        "Denoising log-ratios regress on the difference of two images' rewards, clipped",
        paper=25,
    ),
    _row(
        "online", "rladapter", "RLAdapter", "Zhang and Lu, 2023", "2309.17176",
        "RLAdapter: Bridging Large Language Models to Reinforcement Learning in Open Worlds",
        "categorical language",
        "A small tuned adapter model turns an agent's situation into guidance from a large one",
        paper=29, aliases="adarefiner",
    ),
    _row(
        "online", "t1", "T1", "Hou et al., 2025", "2501.11651",
        "T1: Advancing Language Model Reasoning through Reinforcement Learning and Inference Scaling",
        "language",
        "Reasoning by oversampling, entropy bonus, moving reference and pattern penalties",
        paper=30,
    ),
    _row(
        "online", "archer", "ArCHer", "Zhou et al., 2024", "2402.19446",
        "ArCHer: Training Language Model Agents via Hierarchical Multi-Turn RL",
        "language",
        "An off-policy critic over whole utterances drives a token-level policy gradient",
        paper=31,
    ),
    _row(
        "online", "taco", "TACO", "Zheng et al., 2023", "2306.13229",
        "TACO: Temporal Latent Action-Driven Contrastive Loss for Visual Reinforcement Learning",
        "gaussian",
        "Control from pixels with state and action features learned by contrast over time",
        paper=32,
    ),
    _row(
        "online", "invariant_marl", "InvariantMARL", "Vignon et al., 2023", "2304.02370",
        "Effective control of two-dimensional Rayleigh–Bénard convection: invariant multi-agent RL is all"
        " you need",
        "gaussian",
        "One shared policy per actuator, each seeing the field centred on itself",
        paper=38, aliases="rbc_marl",
    ),
    _row(
        "online", "tacsl", "AACD", "Akinola et al., 2024", "2408.06506",
        "TacSL: A Library for Visuotactile Sensor Simulation and Learning",
        "gaussian",
        "Policies from touch images; the critic is trained first on privileged state (AACD)",
        paper=39, module="aacd", aliases="aacd",
    ),
    _row(
        "online", "persrfi", "PersRFI", "Shi et al., 2021", "2012.15375",
        "Refine and Imitate: Reducing Repetition and Inconsistency in Persuasion Dialogues via RL and Human"
        " Demonstration",
        "language",
        "Dialogue PPO on detectors of repetition and inconsistency, mixed with human replies",
        paper=43, aliases="refine_imitate",
    ),
    _row(
        "online", "dpa", "DPA", "Wang et al., 2024", "2402.18571",
        "Arithmetic Control of LLMs for Diverse User Preferences: Directional Preference Alignment with"
        " Multi-Objective Rewards",
        "language",
        "One model for all trade-offs: a direction in reward space is written in the prompt",
        paper=45, ready=True,
    ),
    _row(
        "online", "nlpo", "NLPO", "Ramamurthy et al., 2023", "2210.01241",
        "Is Reinforcement Learning (Not) for Natural Language Processing?",
        "language",
        "PPO whose tokens are masked to the top-p set of a lagged copy of the policy",
        paper=46, aliases="rl4lms grue",
    ),
    _row(
        "online", "qweb", "QWeb", "Gur et al., 2019", "1812.09195",
        "Learning to Navigate the Web",
        "categorical",
        "DQN fills web forms; curricula and an instructor network invent the instructions",
        paper=54,
    ),
    _row(
        "online", "long_cot", "LongCoT", "Yeo et al., 2025", "2502.03373",
        "Demystifying Long Chain-of-Thought Reasoning in LLMs",
        "language",
        "Cosine length reward and repetition penalty, each with a discount of its own",
        paper=56, aliases="demystify_long_cot",
    ),
    _row(
        "online", "digirl", "DigiRL", "Bai et al., 2024", "2406.11896",
        "DigiRL: Training In-The-Wild Device-Control Agents with Autonomous RL",
        "vision_language language",
        "Device-control agents: instruction and step values filter what is imitated",
        paper=58,
    ),
    _row(
        "online", "sequence_sac", "SequenceSAC", "Patel and Siegelmann, 2025", "2410.08979",
        "Overcoming Slow Decision Frequencies in Continuous Control: Model-Based Sequence RL for"
        " Model-Free Control",
        "gaussian",
        "One observation gives a sequence of actions, trained with a learned one-step model",
        paper=60, aliases="sequence_rl", ready=True,
    ),
    _row(
        "online", "mdpo", "MDPOOn", "Tomar et al., 2022", "2005.09814",
        "Mirror Descent Policy Optimization",
        "gaussian categorical",
        "Policy improvement as mirror descent: several steps on advantage minus KL to the last",
        paper=61, module="mdpo_on", aliases="mdpo_on", ready=True,
    ),
    _row(
        "online", "mdpo_off", "MDPOOff", "Tomar et al., 2022", "",
        "Mirror Descent Policy Optimization (off-policy)",
        "gaussian",
        "Soft actor-critic whose actor also stays near the policy of some time ago",
        ready=True,
    ),
    _row(
        "study", "hl_gauss", None, "Farebrother et al., 2024", "2403.03950",
        "Stop Regressing: Training Value Functions via Classification for Scalable Deep RL",
        "categorical gaussian",
        "Values learned by cross-entropy with a soft histogram: any critic, by --head hl_gauss",
        paper=62, aliases="stop_regressing", ready=True,
    ),
    _row(
        "online", "resip", "ResiP", "Ankile et al., 2024", "2407.16677",
        "From Imitation to Refinement -- Residual RL for Precise Visual Assembly",
        "residual action_diffusion",
        "PPO on a small per-step correction over a frozen policy of action chunks",
        paper=65,
    ),
    _row(
        "online", "rlcf", "RLCF", "Zhao et al., 2024", "2305.18010",
        "Test-Time Adaptation with CLIP Reward for Zero-Shot Generalization in Vision-Language Models",
        "vision_language",
        "Adapts to one unlabelled test sample by a few REINFORCE steps on a CLIP reward",
        paper=68,
    ),
    _row(
        "online", "learning_to_fly", "LearningToFly", "Eschmann et al., 2024", "2311.13081",
        "Learning to Fly in Seconds",
        "deterministic",
        "TD3 with a privileged critic, curriculum and fast simulator flies a quadrotor",
        paper=71, aliases="l2f",
    ),
    _row(
        "online", "rnd_ppo", "RNDPPO", "Yin et al., 2024", "2404.12594",
        "Random Network Distillation Based Deep RL for AGV Path Planning",
        "gaussian",
        "PPO with a novelty bonus finds sparse targets in a warehouse",
        paper=72, aliases="rnd rnd_agv", ready=True,
    ),
    _row(
        "online", "ppo", "PPO", "Schulman et al., 2017", "1707.06347",
        "Proximal Policy Optimization Algorithms",
        "categorical gaussian language diffusion consistency",
        "Policy gradient with a clipped probability ratio",
        ready=True,
    ),
    _row(
        "online", "grpo", "GRPO", "Shao et al., 2024", "2402.03300",
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "categorical gaussian language diffusion consistency",
        "Advantages relative to the group of answers to one prompt; no critic",
        ready=True,
    ),
    _row(
        "online", "rebel", "REBEL", "Gao et al., 2024", "2404.16767",
        "REBEL: Reinforcement Learning via Regressing Relative Rewards",
        "categorical gaussian language diffusion consistency",
        "Log-ratios of two samples regress on the difference of their rewards",
        ready=True,
    ),
    _row(
        "online", "ddpo", "DDPO", "Black et al., 2024", "2305.13301",
        "Training Diffusion Models with Reinforcement Learning",
        "diffusion",
        "Denoising as a decision process, trained by clipped policy gradient",
        ready=True,
    ),
    _row(
        "online", "reinforce", "Reinforce", "Williams, 1992", "",
        "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning",
        "categorical gaussian language diffusion consistency",
        "The plain score-function policy gradient with a baseline",
        ready=True,
    ),
    _row(
        "online", "a2c", "A2C", "Mnih et al., 2016", "1602.01783",
        "Asynchronous Methods for Deep Reinforcement Learning",
        "categorical gaussian language",
        "Synchronous advantage actor-critic",
        ready=True,
    ),
    _row(
        "online", "trpo", "TRPO", "Schulman et al., 2015", "1502.05477",
        "Trust Region Policy Optimization",
        "categorical gaussian",
        "Natural policy gradient steps inside a KL trust region",
        ready=True,
    ),
    _row(
        "online", "impala", "IMPALA", "Espeholt et al., 2018", "1802.01561",
        "IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner Architectures",
        "categorical",
        "Actor-critic on stale experience, corrected by V-trace",
    ),
    _row(
        "online", "sac", "SAC", "Haarnoja et al., 2018", "1801.01290",
        "Soft Actor-Critic: Off-Policy Maximum Entropy Deep Reinforcement Learning with a Stochastic Actor",
        "gaussian categorical",
        "Off-policy maximum-entropy actor-critic with twin critics",
        ready=True,
    ),
    _row(
        "online", "td3", "TD3", "Fujimoto et al., 2018", "1802.09477",
        "Addressing Function Approximation Error in Actor-Critic Methods",
        "deterministic",
        "Deterministic policy gradient with twin critics, smoothing and delay",
        ready=True,
    ),
    _row(
        "online", "dqn", "DQN", "Mnih et al., 2015", "",
        "Human-level control through deep reinforcement learning",
        "categorical",
        "Q-learning with replay and a target network",
        ready=True,
    ),
    _row(
        "online", "rloo", "RLOO", "Ahmadian et al., 2024", "2402.14740",
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
        "language categorical gaussian",
        "REINFORCE with the mean of the other samples as baseline",
        ready=True,
    ),
    _row(
        "online", "remax", "ReMax", "Li et al., 2024", "2310.10505",
        "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language"
        " Models",
        "language",
        "REINFORCE with the reward of the greedy answer as baseline",
        ready=True,
    ),
    _row(
        "online", "safe_rlhf", "SafeRLHF", "Dai et al., 2024", "2310.12773",
        "Safe RLHF: Safe Reinforcement Learning from Human Feedback",
        "language",
        "PPO on a reward under a cost limit held by a Lagrange multiplier",
        ready=True,
    ),
    _row(
        "online", "best_of_n", "BestOfN", "Stiennon et al., 2020", "2009.01325",
        "Learning to summarize from human feedback",
        "language",
        "Samples n answers and keeps the one that the judge scores highest",
        ready=True,
    ),
    _row(
        "online", "rejection_sampling", "RejectionSampling", "Yuan et al., 2023", "2308.01825",
        "Scaling Relationship on Learning Mathematical Reasoning with Large Language Models",
        "language categorical gaussian",
        "Fine-tunes on the model's own answers that pass the check (RFT)",
        aliases="rft raft rest", ready=True,
    ),
    # ------------------------------------------------------------------ preference: comparisons
    _row(
        "preference", "cpl", "CPL", "Hejna et al., 2024", "2310.13639",
        "Contrastive Preference Learning: Learning from Human Feedback without RL",
        "gaussian deterministic categorical language",
        "Preferences between segments read as regret fit the policy without a reward model",
        paper=4,
    ),
    _row(
        "preference", "seppo", "SePPO", "Zhang et al., 2024", "2410.05255",
        "SePPO: Semi-Policy Preference Optimization for Diffusion Alignment",
        "diffusion video",
        "Winners only: earlier checkpoints paint the rival, used or rejected per example",
        paper=5,
    ),
    _row(
        "preference", "dno", "DNO", "Rosset et al., 2024", "2404.03715",
        "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences",
        "language tabular",
        "Self-improvement towards the answers that no others beat, by batched regression",
        paper=12, ready=True,
    ),
    _row(
        "preference", "nash_md", "NashMD", "Munos et al., 2024", "2312.00886",
        "Nash Learning from Human Feedback",
        "language tabular",
        "Mirror descent against a mixture of policy and reference reaches the Nash equilibrium",
        paper=20, aliases="nash_ema nlhf", ready=True,
    ),
    _row(
        "preference", "d3po", "D3PO", "Yang et al., 2024", "2311.13231",
        "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model",
        "diffusion",
        "DPO on every denoising step of a preferred image; no reward model",
        paper=28,
    ),
    _row(
        "preference", "hypo", "HyPO", "Song et al., 2024", "2406.01462",
        "The Importance of Online Data: Understanding Preference Fine-tuning via Coverage",
        "language tabular",
        "DPO on recorded pairs plus a KL penalty on the policy's own samples",
        paper=33, ready=True,
    ),
    _row(
        "preference", "rso", "RSO", "Liu et al., 2024", "2309.06657",
        "Statistical Rejection Sampling Improves Preference Optimization",
        "language",
        "Draws preference pairs from the estimated optimal policy by rejection sampling",
        paper=53, ready=True,
    ),
    _row(
        "preference", "dpo", "DPO", "Rafailov et al., 2023", "2305.18290",
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "language tabular",
        "One logistic loss on preference pairs; the log-ratio to the reference is the reward",
        paper=73, ready=True,
    ),
    _row(
        "preference", "diffusion_dpo", "DiffusionDPO", "Wallace et al., 2024", "2311.12908",
        "Diffusion Model Alignment Using Direct Preference Optimization",
        "diffusion",
        "DPO with denoising errors in place of likelihoods",
    ),
    # ------------------------------------------------------------------ offline: recorded data and rewards
    _row(
        "offline", "direct_advantage", "DirectAdvantage", "Liu et al., 2024", "2412.18279",
        "Improving Multi-Step Reasoning Abilities of LLMs with Direct Advantage Policy Optimization",
        "language",
        "Log-ratios of reasoning steps regress on advantages of a critic trained beforehand",
        paper=16,
    ),
    _row(
        "offline", "f_dvl", "FDVL", "Sikchi et al., 2024", "2302.08560",
        "Dual RL: Unification and New Methods for Reinforcement and Imitation Learning",
        "gaussian",
        "Dual value learning under an f-divergence: offline RL (f-DVL), imitation (ReCOIL)",
        paper=19, aliases="recoil dual_rl",
    ),
    _row(
        "offline", "prdc", "PRDC", "Ran et al., 2023", "2306.06569",
        "Policy Regularization with Dataset Constraint for Offline Reinforcement Learning",
        "deterministic",
        "TD3 whose actions stay near the closest recorded state-action pair",
        paper=40,
    ),
    _row(
        "offline", "a_lol", "ALoL", "Baheti et al., 2024", "2305.14718",
        "Improving Language Models with Advantage-based Offline Policy Gradients",
        "language",
        "Fine-tunes on recorded answers of positive advantage, weighted by it",
        paper=48, ready=True,
    ),
    _row(
        "offline", "h2o", "H2O", "Niu et al., 2022", "2206.13464",
        "When to Trust Your Simulator: Dynamics-Aware Hybrid Offline-and-Online Reinforcement Learning",
        "gaussian",
        "SAC on real records and a wrong simulator, trusted where their dynamics agree",
        paper=50,
    ),
    _row(
        "offline", "ss_orl", "SSORL", "Zheng et al., 2023", "2210.06518",
        "Semi-Supervised Offline Reinforcement Learning with Action-Free Trajectories",
        "deterministic gaussian sequence",
        "An inverse dynamics model fills in missing actions; any offline method follows",
        paper=51,
    ),
    _row(
        "offline", "lamo", "LaMo", "Shi et al., 2024", "2310.20587",
        "Unleashing the Power of Pre-trained Language Models for Offline Reinforcement Learning",
        "sequence",
        "A decision transformer on a frozen language model with LoRA, from few trajectories",
        paper=66,
    ),
    _row(
        "offline", "iql", "IQL", "Kostrikov et al., 2022", "2110.06169",
        "Offline Reinforcement Learning with Implicit Q-Learning",
        "gaussian deterministic",
        "Expectile values never query unseen actions; advantage-weighted policy",
    ),
    _row(
        "offline", "cql", "CQL", "Kumar et al., 2020", "2006.04779",
        "Conservative Q-Learning for Offline Reinforcement Learning",
        "gaussian categorical",
        "SAC with values pushed down on actions outside the data",
    ),
    _row(
        "offline", "td3_bc", "TD3BC", "Fujimoto and Gu, 2021", "2106.06860",
        "A Minimalist Approach to Offline Reinforcement Learning",
        "deterministic",
        "TD3 plus a behaviour cloning term",
    ),
    _row(
        "offline", "awr", "AWR", "Peng et al., 2019", "1910.00177",
        "Advantage-Weighted Regression: Simple and Scalable Off-Policy Reinforcement Learning",
        "gaussian categorical language",
        "Imitates recorded actions, weighted by the exponential of their advantage",
    ),
    _row(
        "offline", "decision_transformer", "DecisionTransformer", "Chen et al., 2021", "2106.01345",
        "Decision Transformer: Reinforcement Learning via Sequence Modeling",
        "sequence",
        "A transformer predicts the action that leads to a wanted return",
    ),
    # ------------------------------------------------------------------ imitation: demonstrations, take-overs
    _row(
        "imitation", "hil_serl", "HILSERL", "Luo et al., 2024", "2410.21845",
        "Precise and Dexterous Robotic Manipulation via Human-in-the-Loop Reinforcement Learning",
        "gaussian",
        "Off-policy RL from demonstrations, corrections and a learned success classifier",
        paper=7,
    ),
    _row(
        "imitation", "rlif", "RLIF", "Luo et al., 2024", "2311.12996",
        "RLIF: Interactive Imitation Learning as Reinforcement Learning",
        "gaussian",
        "A take-over is the only signal: the step that caused it is punished",
        paper=18,
    ),
    _row(
        "imitation", "drrl", "DRRL", "Tiapkin et al., 2024", "2310.17303",
        "Demonstration-Regularized RL",
        "tabular",
        "Clones demonstrations, then explores under a KL penalty to the clone",
        paper=24, aliases="demonstration_regularized_rl",
    ),
    _row(
        "imitation", "sdp", "StreamingDiffusionPolicy", "Høeg et al., 2024", "2406.04806",
        "Streaming Diffusion Policy: Fast Policy Synthesis with Variable Noise Diffusion Models",
        "action_diffusion",
        "A rolling buffer of actions, near ones almost clean, replans in few denoising steps",
        paper=55, module="streaming_diffusion_policy", aliases="streaming_diffusion_policy",
    ),
    _row(
        "imitation", "in_context_rl", "InContextRL", "Lin et al., 2024", "2310.08566",
        "Transformers as Decision Makers: Provable In-Context RL via Supervised Pretraining",
        "sequence",
        "A transformer imitates learning algorithms from their histories, weights then fixed",
        paper=57, aliases="transformers_as_decision_makers",
    ),
    _row(
        "imitation", "sft", "SFT", "Ouyang et al., 2022", "2203.02155",
        "Training language models to follow instructions with human feedback",
        "language",
        "Supervised fine-tuning on written answers",
        ready=True,
    ),
    _row(
        "imitation", "bc", "BC", "Pomerleau, 1988", "",
        "ALVINN: An Autonomous Land Vehicle in a Neural Network",
        "gaussian deterministic categorical",
        "Behaviour cloning: maximum likelihood of demonstrated actions",
    ),
    _row(
        "imitation", "dagger", "DAgger", "Ross et al., 2011", "1011.0686",
        "A Reduction of Imitation Learning and Structured Prediction to No-Regret Online Learning",
        "gaussian deterministic categorical",
        "The expert labels the states that the learner visits",
    ),
    _row(
        "imitation", "gail", "GAIL", "Ho and Ermon, 2016", "1606.03476",
        "Generative Adversarial Imitation Learning",
        "gaussian categorical language",
        "The reward is a discriminator between the expert and the learner",
    ),
    _row(
        "imitation", "rlpd", "RLPD", "Ball et al., 2023", "2302.02948",
        "Efficient Online Reinforcement Learning with Offline Data",
        "gaussian",
        "SAC on batches that are half replay, half recorded data",
    ),
    _row(
        "imitation", "diffusion_policy", "DiffusionPolicy", "Chi et al., 2023", "2303.04137",
        "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion",
        "action_diffusion",
        "Clones demonstrations by denoising chunks of actions",
    ),
    # ------------------------------------------------------------------ reward: learns the judge
    _row(
        "reward", "rm_secrets", "RMSecrets", "Wang et al., 2024", "2401.06080",
        "Secrets of RLHF in Large Language Models Part II: Reward Modeling",
        "reward_model",
        "Grades label strength by a vote; contrastive and meta-learned reward models (MetaRM)",
        paper=8, aliases="meta_rm",
    ),
    _row(
        "reward", "contrast_instructions", "ConvexDA", "Shen et al., 2024", "2309.16155",
        "The Trickle-down Impact of Reward (In-)consistency on RLHF",
        "reward_model",
        "Tests whether a judge reads the prompt; ConvexDA and RewardFusion mend it",
        paper=11, aliases="convex_da reward_fusion",
    ),
    _row(
        "reward", "offline_rl_vlm_f", "OfflineRLVLMF", "Venkataraman et al., 2024", "2411.05273",
        "Real-World Offline Reinforcement Learning from Vision Language Model Feedback",
        "reward_model gaussian",
        "A vision-language model compares images; the learned reward labels data for IQL",
        paper=22,
    ),
    _row(
        "reward", "goal_conditioned_rm", "GoalConditionedRM", "Nath et al., 2024", "2407.13887",
        "Learning Goal-Conditioned Representations for Language Reward Models",
        "reward_model",
        "Contrastive goal states give a reward model a value for every prefix",
        paper=26,
    ),
    _row(
        "reward", "ensemble", "Ensemble", "Coste et al., 2024", "2310.02743",
        "Reward Model Ensembles Help Mitigate Overoptimization",
        "reward_model",
        "Reward models that differ by seed, joined conservatively, resist overoptimisation",
        paper=36, aliases="rm_ensemble rm_ensembles",
    ),
    _row(
        "reward", "ultrafeedback", "UltraFeedback", "Cui et al., 2024", "2310.01377",
        "UltraFeedback: Boosting Language Models with High-quality (Scaled AI) Feedback",
        "reward_model language",
        "Many models answer, a judge rates four aspects with reasons; a reward model follows",
        paper=42,
    ),
    _row(
        "reward", "heron", "HERON", "Bukharin et al., 2023", "2309.02632",
        "Deep Reinforcement Learning from Hierarchical Weak Preference Feedback",
        "reward_model gaussian deterministic",
        "Reward factors are only ranked by importance; comparisons down the list teach a reward",
        paper=70,
    ),
    _row(
        "reward", "vpl", "VPL", "Poddar et al., 2024", "2408.10075",
        "Personalizing RLHF with Variational Preference Learning",
        "reward_model gaussian",
        "Infers a latent user from a few answers and gives each user a reward",
        paper=74,
    ),
    _row(
        "reward", "bradley_terry", "BradleyTerry", "Christiano et al., 2017", "1706.03741",
        "Deep reinforcement learning from human preferences",
        "reward_model language",
        "A reward model by maximum likelihood of pairwise choices",
        aliases="reward_model", ready=True,
    ),
    _row(
        "reward", "preference_model", "PairwisePreference", "Jiang et al., 2023", "2306.02561",
        "LLM-Blender: Ensembling Large Language Models with Pairwise Ranking and Generative Fusion",
        "reward_model language",
        "A judge that reads both answers of a pair at once, so it may prefer in circles",
        ready=True,
    ),
    # ------------------------------------------------------------------ distillation: a teacher
    _row(
        "distillation", "rg_lcd", "RGLCD", "Li et al., 2024", "2403.11027",
        "Reward Guided Latent Consistency Distillation",
        "consistency",
        "Consistency distillation with the gradient of a (latent) reward model",
        paper=3,
    ),
    _row(
        "distillation", "teacher_hacking", "TokenDistillation", "Tiapkin et al., 2025", "2502.02671",
        "On Teacher Hacking in Language Model Distillation",
        "language",
        "Distils a language model and shows when the student games its teacher",
        paper=6, module="token_distillation", aliases="token_distillation",
    ),
    _row(
        "distillation", "dcd", "DCD", "Rao et al., 2023", "2207.01426",
        "Dynamic Contrastive Distillation for Image-Text Retrieval",
        "vision_language",
        "Distils an image-text ranker on negatives picked and weighted by the teacher",
        paper=14,
    ),
    _row(
        "distillation", "mcm", "MCM", "Zhai et al., 2024", "2406.06890",
        "Motion Consistency Model: Accelerating Video Diffusion with Disentangled Motion-Appearance"
        " Distillation",
        "video consistency",
        "Distils motion from a video teacher and appearance from good still images",
        paper=17,
    ),
    _row(
        "distillation", "random_teachers", "RandomTeachers", "Sarnthein et al., 2023", "2302.12091",
        "Random Teachers are Good Teachers",
        "encoder",
        "A student of a random frozen network grows better features than its teacher",
        paper=35,
    ),
    _row(
        "distillation", "gaussian_grasper", "GaussianGrasper", "Zheng et al., 2024", "2403.09637",
        "GaussianGrasper: 3D Language Gaussian Splatting for Open-vocabulary Robotic Grasping",
        "vision_language",
        "Language features distilled into a 3D Gaussian scene answer which object to grasp",
        paper=49,
    ),
    _row(
        "distillation", "hyper_sd", "HyperSD", "Ren et al., 2024", "2404.13686",
        "Hyper-SD: Trajectory Segmented Consistency Model for Efficient Image Synthesis",
        "consistency diffusion",
        "Consistency in shrinking time segments, then rewards and score distillation",
        paper=52,
    ),
    _row(
        "distillation", "dataset_reinforcement", "DatasetReinforcement", "Faghri et al., 2023", "2303.08983",
        "Reinforce Data, Multiply Impact: Improved Model Accuracy and Robustness with Dataset Reinforcement",
        "encoder",
        "The teacher runs once: its labels of stored augmentations serve every later training",
        paper=63,
    ),
    _row(
        "distillation", "consistency_distillation", "ConsistencyDistillation",
        "Luo et al., 2023", "2310.04378",
        "Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference",
        "consistency",
        "Distils a diffusion model into a sampler of one to eight steps",
        module="consistency", aliases="consistency lcd",
    ),
    _row(
        "distillation", "knowledge_distillation", "KnowledgeDistillation",
        "Hinton et al., 2015", "1503.02531",
        "Distilling the Knowledge in a Neural Network",
        "encoder language",
        "The student fits the teacher's softened probabilities",
        aliases="kd",
    ),
    # ------------------------------------------------------------------ model_based: a known or learned model
    _row(
        "model_based", "contrastive_ucb", "ContrastiveUCB", "Qiu et al., 2022", "2207.14800",
        "Contrastive UCB: Provably Efficient Contrastive Self-Supervised Learning in Online Reinforcement"
        " Learning",
        "tabular categorical",
        "Contrastive features give a model and an optimism bonus, in MDPs and Markov games",
        paper=2, aliases="spr_ucb",
    ),
    _row(
        "model_based", "sindy_rl", "SINDyRL", "Zolman et al., 2024", "2403.09110",
        "SINDy-RL: Interpretable and Efficient Model-Based Reinforcement Learning",
        "gaussian",
        "PPO inside sparse polynomial dynamics, then a closed-form policy",
        paper=27,
    ),
    _row(
        "model_based", "mbtl", "MBTL", "Cho et al., 2024", "2408.04498",
        "Model-Based Transfer Learning for Contextual Reinforcement Learning",
        "gaussian categorical",
        "A Gaussian process picks which task of a family to train on next",
        paper=67,
    ),
    _row(
        "model_based", "ucbvi", "UCBVI", "Azar et al., 2017", "1703.05449",
        "Minimax Regret Bounds for Reinforcement Learning",
        "tabular",
        "Optimistic value iteration with a bonus for rarely tried actions",
    ),
    # ------------------------------------------------------------------ engine: where roles run
    _row(
        "engine", "srl", None, "Mei et al., 2024", "2306.16688",
        "SRL: Scaling Distributed Reinforcement Learning to Over Ten Thousand Cores",
        "categorical gaussian language",
        "Actors, inference and training as workers joined by streams, each scaled on its own",
        paper=37, module="streams",
    ),
    _row(
        "engine", "hybridflow", None, "Sheng et al., 2025", "2409.19256",
        "HybridFlow: A Flexible and Efficient RLHF Framework",
        "language",
        "One controller script calls worker groups; placement and layout are configuration",
        paper=44, module="ray", aliases="verl", ready=True,
    ),
    _row(
        "engine", "realhf", None, "Mei et al., 2024", "2406.14088",
        "ReaLHF: Optimized RLHF Training for Large Language Models through Parameter Reallocation",
        "language",
        "Searches a device mesh and layout for each call and moves parameters between them",
        paper=64, module="plan", ready=True,
    ),
    # ------------------------------------------------------------------ study: surveys and diagnoses
    _row(
        "study", "rl_era_llms", None, "Sun, 2023", "2310.06147",
        "RL in the era of LLMs: What is Essential? What is Needed? An RL Perspective on RLHF, Prompting,"
        " and Beyond",
        "language categorical",
        "Alignment in RL terms: five claims on error compounding, proxies and stability",
        paper=34,
    ),
    _row(
        "study", "r_to_qstar", None, "Rafailov et al., 2024", "2404.12358",
        "From r to Q*: Your Language Model is Secretly a Q-Function",
        "language tabular",
        "DPO read token by token: implicit rewards, credit and search by likelihood",
        paper=41, ready=True,
    ),
    _row(
        "study", "transformers_in_rl", None, "Agarwal et al., 2023", "2307.05979",
        "Transformers in Reinforcement Learning: A Survey",
        "sequence categorical",
        "Where a transformer helps: memory, credit over time, combinatorial choices",
        paper=47,
    ),
    _row(
        "study", "alignment_ceiling", None, "Lambert and Calandra, 2023", "2311.00168",
        "The Alignment Ceiling: Objective Mismatch in Reinforcement Learning from Human Feedback",
        "language reward_model",
        "Measures how judge accuracy, reward and evaluation come apart",
        paper=59, aliases="objective_mismatch",
    ),
    _row(
        "study", "rlhf_survey", None, "Kaufmann et al., 2025", "2312.14925",
        "A Survey of Reinforcement Learning from Human Feedback",
        "gaussian reward_model",
        "The loop of feedback, reward model and policy with actively chosen comparisons",
        paper=69,
    ),
)  # fmt: skip


def find(slug: str) -> System:
    """The system of that name or alias; ``-`` and capital letters are forgiven."""
    name = slug.strip().lower().replace("-", "_")
    for system in SYSTEMS:
        if name == system.slug or name in system.aliases:
            return system
    known = [system.slug for system in SYSTEMS] + [alias for system in SYSTEMS for alias in system.aliases]
    raise UsageError(f"there is no system '{slug}': {nearest(name, known)} (`guerdon list` shows them all)")


def register(system: System) -> None:
    """Add a row for a method of your own, so that ``guerdon.train`` finds it by its slug. A row with the same
    slug is replaced."""
    global SYSTEMS
    SYSTEMS = (*(row for row in SYSTEMS if row.slug != system.slug), system)


def systems(family: str | None = None, policy: str | None = None, status: str | None = None) -> list[System]:
    """The systems that pass every filter given, in the table's order."""
    _check("family", family, FAMILIES)
    _check("policy", policy, POLICIES)
    _check("status", status, STATUSES)
    return [
        system
        for system in SYSTEMS
        if (family is None or system.family == family)
        and (policy is None or policy in system.policies)
        and (status is None or system.status == status)
    ]


def by_paper(n: int) -> System:
    """The system of paper ``n``."""
    for system in SYSTEMS:
        if system.paper == n:
            return system
    last = max(system.paper or 0 for system in SYSTEMS)
    raise UsageError(f"there is no paper {n}: they are numbered 1 to {last}")


def _check(what: str, value: str | None, known: Iterable[str]) -> None:
    if value is not None and value not in known:
        raise UsageError(f"there is no {what} '{value}': use one of {', '.join(known)}")


def render(systems: Iterable[System]) -> str:
    """A plain table, one system a line, for pipes and files."""
    rows = [("NAME", "STATUS", "FAMILY", "POLICIES", "SUMMARY")]
    for system in systems:
        also = f"; also {', '.join(system.aliases)}" if system.aliases else ""
        summary = f"{system.summary} ({system.reference}{also})"
        rows.append((system.slug, system.status, system.family, ",".join(system.policies), summary))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows)


def show(systems: Iterable[System], console: Console | None = None) -> None:
    """Print a table for people: one block a family, what is ready first; readable from 80 columns on."""
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    console = console or RichConsole()
    chosen = sorted(systems, key=lambda system: system.status != "ready")
    name_width = max((len(system.slug) for system in chosen), default=0)
    for family, learns in FAMILIES.items():
        rows = [system for system in chosen if system.family == family]
        if not rows:
            continue
        console.print(Text.assemble((family, "bold"), (f": {learns}", "dim")))
        table = Table(box=None, show_header=False, expand=True, padding=(0, 2, 0, 0), pad_edge=False)
        table.add_column("name", width=name_width, no_wrap=True)
        table.add_column("status", width=len("planned"), no_wrap=True)
        table.add_column("summary", ratio=1)
        for system in rows:
            ready = system.status == "ready"
            table.add_row(
                Text(system.slug, style="bold green" if ready else ""),
                Text(system.status, style="green" if ready else "dim"),
                Text.assemble(system.summary, (f" [{', '.join(system.policies)}]", "dim")),
            )
        console.print(table)
        console.print()
    ready_count = sum(system.status == "ready" for system in chosen)
    console.print(Text(f"{len(chosen)} systems, {ready_count} ready", style="dim"))
