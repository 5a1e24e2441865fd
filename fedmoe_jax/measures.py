"""The measures of a run: one row each, from a round's metric to the report's column.

A measure of one's own is a row `key: Measure(...)` of a module's `MEASURES`, on a field
that the rows of a run already have; `plugins.load_plugins` joins it to this table.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmoe_jax.options import (
    COST,
    DEVICES,
    EXPERTS,
    FINAL,
    LABELS,
    LAST,
    LEARNING,
    MAX,
    MEAN,
    ROUNDS,
    TOTAL,
    Curve,
    Measure,
    UserError,
    fits_kind,
    is_number,
)

OUTCOMES = (  # of a client's round, by code
    "merged",
    "stale",  # past the deadline, merged in the next round
    "dropped",  # past the deadline
    "lost_unreachable",
    "lost_dropout",
    "lost_memory",  # held more than its memory
    "lost_outage",  # the link failed
    "nonfinite",  # a broken update
)
# Of clients whose update does not count, whatever the reason.
LOST = tuple(f"{name}_clients" for name in OUTCOMES if name not in ("merged", "stale"))

# Fields of an evaluation with a number for each stratum, in front of `_accuracy` and
# `_bits`, by the model that is scored.
STRATA = {
    "global": "stratum",
    "personal": "personal_stratum",
    "finetuned": "finetuned_stratum",
}
OF_STRATA = tuple(
    f"{field}_{value}" for field in STRATA.values() for value in ("accuracy", "bits")
)

# Fields of rows with a number for each MoE layer, of models with several, by the key of
# the measure that is of their mean.
LAYERS = {
    "mean_load_cv": "layer_load_cv",
    "mean_load_entropy": "layer_load_entropy",
    "starved_experts": "layer_starved_experts",
    "final_group_information": "layer_group_information",
}

SUMMED = (  # fields whose sum so far is in every row
    "bytes_up",
    "bytes_down",
    "client_flops",
    "compute_joules",
    "radio_joules",
    "wasted_bytes",
    "wasted_flops",
    "server_flops",
    "capacity_violations",
    *(f"{name}_clients" for name in OUTCOMES),
)

ACCURACY = Measure("", FINAL, better=1, scale=100.0, evaluated=True)
NEVER = -1.0  # no accuracy and no count, so that a column needs any number at all
NOWHERE = 9.0  # likewise, no correlation and no difference of accuracies
ASIDE = ACCURACY._replace(trivial=NEVER)  # of examples that not every run sets aside
BITS = Measure("", FINAL, better=-1, digits=3, evaluated=True, trivial=NEVER)
PERPLEXITY = "final_global_perplexity"  # key of a number that is made of bits
TRAFFIC = Measure("", MEAN, better=-1, unit=1e6, group=COST, zero_wins=False)

MEASURES: dict[str, Measure] = {
    "final_global_accuracy": ACCURACY._replace(
        field="global_accuracy",
        title="Global %",
        about="top-A routing over all experts, on the whole test set",
        printed=True,
        line="Global",
        curve=Curve(
            "Global accuracy (%)",
            "Global accuracy: top-A routing over all experts, on the whole test set; "
            "where gates are personal, the mean over the clients' models. Look for the "
            "curves that climb first, end highest or stop early.",
            chance=True,
            costs=True,
        ),
    ),
    "final_global_soft_accuracy": ACCURACY._replace(
        field="global_soft_accuracy",
        title="Global soft %",
        trivial=NEVER,
        about="with all experts, weighted by the whole gate",
        printed=True,
        line="Global soft",
        curve=Curve(
            "Global soft accuracy (%)",
            "Global accuracy of the soft mixture of all experts. Far above the top-A "
            "curve, the gate does not send examples to the experts that know them.",
            chance=True,
        ),
    ),
    "final_personal_accuracy": ACCURACY._replace(
        field="personal_accuracy",
        title="Personal %",
        about="each client's held experts on the test set weighted to its own label "
        "mix, the mean over clients; see evaluation.clients",
        printed=True,
        line="Personal",
        curve=Curve(
            "Personal accuracy (%)",
            "Personal accuracy: each client's own experts on its own classes. High "
            "with a low global accuracy, the experts serve their clients but not one "
            "another.",
            costs=True,
        ),
    ),
    "final_worst_decile_accuracy": ACCURACY._replace(
        field="worst_decile_accuracy",
        title="Worst decile %",
        about="personal accuracy of the worst tenth of the clients",
        line="Worst decile",
    ),
    "final_accuracy_spread": ACCURACY._replace(
        field="accuracy_spread",
        title="SD over clients, points",
        about="standard deviation of the clients' personal accuracies",
        better=-1,
    ),
    "final_weakest_accuracy": ACCURACY._replace(
        field="weakest_accuracy",
        title="Weak third %",
        about="personal accuracy of the third of the clients whose devices have the "
        "least memory",
        trivial=NEVER,
    ),
    "final_capacity_gap": ACCURACY._replace(
        field="capacity_gap",
        title="Strong less weak third, points",
        about="personal accuracy of the third with the most memory less that of the "
        "third with the least; less favours strong devices less",
        better=-1,
        trivial=NOWHERE,
    ),
    "final_capacity_correlation": Measure(
        "capacity_correlation",
        FINAL,
        "Capacity and accuracy",
        "Spearman's correlation of a client's memory with its personal accuracy, -1 to "
        "1; 0: strong devices are served no better",
        better=-1,
        digits=2,
        trivial=NOWHERE,
        evaluated=True,
    ),
    "final_personal_prior_accuracy": ACCURACY._replace(
        field="personal_prior_accuracy",
        title="Personal, prior %",
        about="personal accuracy of argmax(logits + log(the client's own label "
        "histogram + 0.001)), of at most evaluation.clients",
        trivial=NEVER,
        printed=True,
        line="Personal, own prior",
        curve=Curve(
            "Personal accuracy, own prior (%)",
            "Personal accuracy where every client adds the logarithm of its own label "
            "shares to the logits, which it knows without any test image. What a "
            "system gains by it is no merit of its experts.",
            costs=True,
        ),
    ),
    "final_worst_decile_prior_accuracy": ACCURACY._replace(
        field="worst_decile_prior_accuracy",
        title="Worst decile, prior %",
        about="of the same accuracies, the worst tenth of the clients",
        trivial=NEVER,
    ),
    "final_personal_finetuned_accuracy": ASIDE._replace(
        field="personal_finetuned_accuracy",
        title="Personal, fine-tuned %",
        about="personal accuracy at the end, after one more local round; see "
        "evaluation.finetune",
        line="Personal, fine-tuned",
    ),
    "final_worst_decile_finetuned_accuracy": ASIDE._replace(
        field="worst_decile_finetuned_accuracy",
        title="Worst decile, fine-tuned %",
        about="of the same accuracies, the worst tenth of the clients",
    ),
    "final_personal_submodel_accuracy": ASIDE._replace(
        field="personal_submodel_accuracy",
        title="Own sub-network %",
        about="each client's pruned sub-network as it has it at the end, weighted to "
        "its own mix; Personal % is of whole experts; see evaluation.finetune",
        line="Own sub-network",
    ),
    "final_worst_decile_submodel_accuracy": ASIDE._replace(
        field="worst_decile_submodel_accuracy",
        title="Worst decile, own sub-network %",
        about="of the same accuracies, the worst tenth of the clients",
    ),
    "final_own_test_accuracy": ASIDE._replace(
        field="own_test_accuracy",
        title="Own test %",
        about="each client's held experts on its own test examples, the mean over "
        "clients; see partition.test_share",
        line="Own test",
    ),
    "final_worst_decile_own_test_accuracy": ASIDE._replace(
        field="worst_decile_own_test_accuracy",
        title="Worst decile, own test %",
        about="of the same accuracies, the worst tenth of the clients",
    ),
    "final_global_bits": BITS._replace(
        field="global_bits",
        title="Global, bits",
        about="cross-entropy of a byte of text (a letter of markov) in bits, whatever "
        "its tokens are, top-A routing over all experts, on the whole test set",
        printed=True,
        curve=Curve(
            "Global loss (bits)",
            "Bits of a byte of the whole test set with all experts; less is better. A "
            "gate that sends tokens to experts that do not know them costs bits here, "
            "and none where clients use their own experts.",
            costs=True,
            limit=True,
        ),
    ),
    PERPLEXITY: Measure(
        "global_bits",
        title="Global perplexity",
        about="of a token: 2 to the power of the global bits of a byte times the bytes "
        "of a token, which are those of the tokenizer; runs with other tokens compare "
        "in bits alone",
        better=-1,
        digits=2,
        trivial=NEVER,
    ),
    "final_personal_bits": BITS._replace(
        field="personal_bits",
        title="Personal, bits",
        about="likewise with each client's held experts, the test set weighted to its "
        "own mix, the mean over clients",
        printed=True,
        curve=Curve(
            "Personal loss (bits)",
            "Bits of a byte with each client's own experts, on its own mix of the "
            "test set; less is better.",
            costs=True,
            limit=True,
        ),
    ),
    "final_worst_decile_bits": BITS._replace(
        field="worst_decile_bits",
        title="Worst decile, bits",
        about="of the same bits, the worst tenth of the clients",
    ),
    "final_personal_finetuned_bits": BITS._replace(
        field="personal_finetuned_bits",
        title="Personal, fine-tuned, bits",
        about="personal bits at the end, after one more local round",
    ),
    "final_personal_submodel_bits": BITS._replace(
        field="personal_submodel_bits",
        title="Own sub-network, bits",
        about="of clients' pruned sub-networks as they have them at the end",
    ),
    "final_worst_decile_submodel_bits": BITS._replace(
        field="worst_decile_submodel_bits",
        title="Worst decile, own sub-network, bits",
        about="of the same bits, the worst tenth of the clients",
    ),
    "final_worst_decile_finetuned_bits": BITS._replace(
        field="worst_decile_finetuned_bits",
        title="Worst decile, fine-tuned, bits",
        about="of the same bits, the worst tenth of the clients",
    ),
    "final_own_test_bits": BITS._replace(
        field="own_test_bits",
        title="Own test, bits",
        about="with each client's held experts on its own test examples, the mean over "
        "clients",
        printed=True,
    ),
    "final_worst_decile_own_test_bits": BITS._replace(
        field="worst_decile_own_test_bits",
        title="Worst decile, own test, bits",
        about="of the same bits, the worst tenth of the clients",
    ),
    "final_unseen_bits": BITS._replace(
        field="unseen_bits",
        title="Unseen clients, bits",
        about="with all experts, or that of a newcomer, on the examples of each client "
        "that never takes part",
    ),
    "final_worst_decile_unseen_bits": BITS._replace(
        field="worst_decile_unseen_bits",
        title="Worst decile, unseen clients, bits",
        about="of the same bits, the worst tenth of these clients",
    ),
    "final_validation_global_bits": BITS._replace(
        field="validation_global_bits",
        title="Validation, global, bits",
        about="global bits on the examples that clients set aside for tuning",
    ),
    "final_validation_personal_bits": BITS._replace(
        field="validation_personal_bits",
        title="Validation, personal, bits",
        about="personal bits on the same examples",
    ),
    "own_test_clients": Measure(
        "own_test_clients",
        LAST,
        "Clients with an own test",
        "clients over which the accuracy on own test examples is the mean",
        better=1,
        digits=0,
        trivial=NEVER,
        evaluated=True,
    ),
    "final_unseen_accuracy": ASIDE._replace(
        field="unseen_accuracy",
        title="Unseen clients %",
        about="top-A routing over all experts, or the expert with which the strategy "
        "serves a newcomer, on the examples of each client that never takes part, the "
        "mean over them; see partition.unseen",
        line="Unseen clients",
    ),
    "final_worst_decile_unseen_accuracy": ASIDE._replace(
        field="worst_decile_unseen_accuracy",
        title="Worst decile, unseen %",
        about="of the same accuracies, the worst tenth of these clients",
    ),
    "final_validation_global_accuracy": ASIDE._replace(
        field="validation_global_accuracy",
        title="Validation, global %",
        about="global accuracy on the validation examples of all clients, to tune by; "
        "see partition.validation_share",
    ),
    "final_validation_personal_accuracy": ASIDE._replace(
        field="validation_personal_accuracy",
        title="Validation, personal %",
        about="personal accuracy on the same examples",
    ),
    "epsilon": Measure(
        "epsilon",
        title="Epsilon",
        about="of the mechanisms of `privacy` that are on, together, for a client that "
        "is replaced by another; it is of what these cover, which the notes say; –: no "
        "guarantee, or none that is accounted for",
        better=0,
        digits=1,
        trivial=NEVER,
    ),
    "final_validation_personal_prior_accuracy": ASIDE._replace(
        field="validation_personal_prior_accuracy",
        title="Validation, personal, prior %",
        about="likewise, with the client's own label prior",
    ),
    "final_linked_accuracy": ASIDE._replace(
        field="linked_global_accuracy",
        title="Global, over links %",
        about="global accuracy where examples reach the experts over the simulated "
        "links; see expert_links",
        line="Global, over links",
        curve=Curve(
            "Global accuracy over links (%)",
            "Global accuracy where examples reach the experts over simulated links, "
            "with noise by their state. What lies between it and the global accuracy "
            "is the price of the links; a gate that sees them pays less.",
            chance=True,
            costs=True,
        ),
    ),
    "final_linked_personal_accuracy": ASIDE._replace(
        field="linked_personal_accuracy",
        title="Personal, over links %",
        about="likewise the personal accuracy",
    ),
    "final_linked_personal_prior_accuracy": ASIDE._replace(
        field="linked_personal_prior_accuracy",
        title="Personal, prior, over links %",
        about="likewise with the client's own label prior",
    ),
    "final_linked_bits": BITS._replace(
        field="linked_global_bits",
        title="Global, over links, bits",
        about="global bits where text reaches the experts over the simulated links; "
        "see expert_links",
    ),
    "final_linked_personal_bits": BITS._replace(
        field="linked_personal_bits",
        title="Personal, over links, bits",
        about="likewise the personal bits",
    ),
    "final_linked_delay": Measure(
        "linked_delay",
        FINAL,
        "Wait for links %",
        "time of the slowest link that an answer over links needs, of all MoE layers "
        "together, in shares of its deadline, the mean over test examples; see "
        "expert_links.airtime",
        better=-1,
        scale=100.0,
        of=EXPERTS,
        trivial=NEVER,
        evaluated=True,
    ),
    "clients_counted": Measure(
        "clients_counted",
        LAST,
        "Clients scored",
        "clients over which personal accuracy is the mean: all of them, or where parts "
        "are personal those that have taken part; of a sample, see evaluation.clients",
        better=1,
        digits=0,
        varies_over=LABELS,
        evaluated=True,
    ),
    "final_groups_found": Measure(
        "groups",
        LAST,
        "Groups found",
        "groups of clients that a strategy has found, mean over layers: 1 where there "
        "are none, 0 where it has not looked yet; see prototypes",
        better=0,
        digits=1,
        of=EXPERTS,
        trivial=0.0,
    ),
    "final_group_information": Measure(
        "expert_group_information",
        FINAL,
        "Group info, bits",
        "mutual information of the clients' groups and the experts that they hold, 0 "
        "to the logarithm of the number of groups or experts; chance gives more than "
        "0, see random; see groups.kind",
        better=1,
        digits=2,
        of=EXPERTS,
        trivial=NEVER,
        evaluated=True,
        curve=Curve(
            "Group information (bits)",
            "Mutual information of the clients' groups and the experts that they hold. "
            "A strategy that finds the groups climbs above one that draws at random, "
            "which is above 0, too, where clients are few.",
        ),
    ),
    "mean_load_cv": Measure(
        "load_cv",
        MEAN,
        "Load CV",
        "standard deviation over mean of the examples that experts train in a round, "
        "the mean over rounds that train any, without a dense warm-up; 0 is even",
        better=-1,
        digits=2,
        of=EXPERTS,
        curve=Curve(
            "CV of expert load",
            "Coefficient of variation over experts of the examples trained in a round; "
            "0 is perfectly even. It should stay low where the strategy counts load.",
        ),
    ),
    "mean_load_entropy": Measure(
        "load_entropy",
        MEAN,
        "Load entropy",
        "of the same examples; 1 is even",
        better=1,
        digits=2,
        of=EXPERTS,
    ),
    "starved_experts": Measure(
        "starved_experts",
        MEAN,
        "Starved experts",
        "experts with less than a tenth of the mean, in a round",
        better=-1,
        of=EXPERTS,
    ),
    "drifted_accuracy": Measure(
        "drifted_accuracy",
        scale=100.0,
        evaluated=True,
        line="Global, drifted images",
        curve=Curve(
            "Accuracy on drifted images (%)",
            "Global accuracy on test images that have drifted as far as the clients' "
            "own. Look for how deep it falls when drift begins, and for the curves "
            "that recover.",
            chance=True,
        ),
    ),
    "expert_accuracy": Measure("expert_accuracy", scale=100.0, evaluated=True),
    "layer_group_information": Measure("layer_group_information", evaluated=True),
    **{name: Measure(name, evaluated=True) for name in OF_STRATA},
    "mean_late_clients": Measure(
        "late_clients",
        MEAN,
        "Late clients a round",
        "clients that needed longer than the deadline",
        better=-1,
        of=DEVICES,
        group=COST,
        printed=True,
    ),
    "mean_lost_clients": Measure(
        LOST[0],
        MEAN,
        "Lost a round",
        "clients whose update did not count, for whatever reason",
        better=-1,
        plus=LOST[1:],
        of=DEVICES,
        group=COST,
        trivial=0.0,
        printed=True,
    ),
    "mean_stale_clients": Measure(
        "stale_clients",
        MEAN,
        "Stale a round",
        "clients whose update came late and counted a round later",
        better=-1,
        of=DEVICES,
        group=COST,
        trivial=0.0,
    ),
    "mean_capacity_violations": Measure(
        "capacity_violations",
        MEAN,
        "Capacity violations a round",
        "clients reached with more than fits into their memory, or more experts than "
        "fit into their shares of the deadline; every client is assigned at least one, "
        "even where none fits",
        better=-1,
        group=COST,
        printed=True,
    ),
    "mean_capacity_error": Measure(
        "capacity_error",
        MEAN,
        "Capacity error",
        "experts by which the server misjudged a client, on average",
        better=-1,
        digits=2,
        of=EXPERTS,
        group=COST,
        trivial=0.0,
        varies_over=ROUNDS,  # a reserve that a server keeps on purpose never changes
        curve=Curve(
            "Error of capacity (experts)",
            "How far the server is off, on average over all clients, when it says how "
            "many experts a client can hold. It should fall where the server learns "
            "from what becomes of the clients; what remains is news that the server "
            "has not yet.",
        ),
    ),
    "final_participation_jain": Measure(
        "participation_jain",
        LAST,
        "Jain of participation",
        "Jain's index of the rounds in which each client's update counted; 1 is even",
        better=1,
        digits=2,
        of=DEVICES,
        group=COST,
        trivial=1.0,
        varies_over=LABELS,
    ),
    "mean_kept_share": Measure(
        "kept_share",
        MEAN,
        "Kept units %",
        "hidden units of the experts that clients hold that are not pruned",
        scale=100.0,
        group=COST,
        trivial=1.0,
    ),
    "mean_kept_spread": Measure(
        "kept_spread",
        MEAN,
        "SD of kept units, points",
        "standard deviation, over the experts of a client, of the share of units kept, "
        "mean over clients: 0 where all are cut alike",
        scale=100.0,
        group=COST,
        trivial=0.0,
    ),
    "mean_mask_overlap": Measure(
        "mask_overlap",
        MEAN,
        "Mask overlap",
        "units that two holders of an expert both keep over those that either does "
        "(Jaccard), over all pairs",
        digits=2,
        group=COST,
        trivial=1.0,
    ),
    "mean_least_coverage": Measure(
        "least_coverage",
        MEAN,
        "Least holders of a unit",
        "clients from which the least trained unit of a trained expert had an update",
        better=1,
        digits=1,
        group=COST,
        trivial=NEVER,
    ),
    "mean_coverage": Measure(
        "mean_coverage",
        MEAN,
        "Holders of a unit",
        "the same, the mean over units",
        better=1,
        digits=1,
        group=COST,
        trivial=NEVER,
    ),
    "least_participation": Measure(
        "least_participation",
        LAST,
        "Least participation %",
        "of the rounds, those in which the client that counted least often did; see "
        "fairness.floor",
        better=1,
        scale=100.0,
        of=DEVICES,
        group=COST,
        trivial=1.0,
        evaluated=True,
    ),
    "longest_queue": Measure(
        "longest_queue",
        LAST,
        "Longest queue",
        "rounds by which the client that is furthest below fairness.floor is behind, "
        "at most; a queue that grows with the rounds shows a floor that is not met",
        better=-1,
        group=COST,
        trivial=NEVER,
        curve=Curve(
            "Longest queue (rounds)",
            "The longest of the clients' virtual queues. Where it levels off the floor "
            "of participation is met in the long run; where it climbs in a line it is "
            "beyond what clients that can be reached and arrive allow.",
        ),
    ),
    "longest_tier_queue": Measure(
        "longest_tier_queue",
        LAST,
        "Longest tier queue",
        "likewise of fairness.expert_floor, in rounds with an update of the tier",
        better=-1,
        of=EXPERTS,
        group=COST,
        trivial=NEVER,
    ),
    "least_tier_share": Measure(
        "least_tier_share",
        LAST,
        "Top experts, least tier %",
        "clients of a capacity that have trained an expert of the fitter half, mean "
        "over rounds, of the capacity and layer with the fewest; with "
        "fairness.expert_floor",
        better=1,
        scale=100.0,
        of=EXPERTS,
        group=COST,
        trivial=NEVER,
    ),
    "final_weakest_top_share": Measure(
        "weakest_top_share",
        FINAL,
        "Top experts, weak third %",
        "clients of the third with the least memory that hold an expert of the fitter "
        "half (by the mean fitness of all clients) since they last took part",
        better=1,
        scale=100.0,
        of=EXPERTS,
        group=COST,
        trivial=1.0,
        evaluated=True,
    ),
    "megabytes_up": TRAFFIC._replace(
        field="bytes_up", title="MB up a round", about="sent by all clients"
    ),
    "megabytes_down": TRAFFIC._replace(
        field="bytes_down", title="MB down a round", about="sent to all clients"
    ),
    "wasted_bytes_share": Measure(
        "wasted_bytes",
        TOTAL,
        "Wasted MB %",
        "of all bytes, those of clients that were lost",
        better=-1,
        per=("bytes_up", "bytes_down"),
        scale=100.0,
        group=COST,
        trivial=0.0,
    ),
    "wasted_megabytes": Measure(
        "wasted_bytes",
        TOTAL,
        "MB lost",
        "bytes of clients that were lost, in the whole run",
        better=-1,
        unit=1e6,
        group=COST,
        trivial=0.0,
    ),
    "outage_share": Measure(
        "lost_outage_clients",
        TOTAL,
        "Outage %",
        "of all clients of all rounds, those whose link failed",
        better=-1,
        per=tuple(f"{name}_clients" for name in OUTCOMES),
        scale=100.0,
        of=DEVICES,
        group=COST,
        trivial=0.0,
    ),
    "gigaflops": Measure(
        "client_flops",
        MEAN,
        "GFLOP a round",
        "of all clients, forward and backward (frozen parts and probes forward "
        "alone). Every "
        "expert that a client holds is charged for every example, chosen by the gate "
        "or not; rounds before a system's own rule sets in count; what the server "
        "trains alone is Server GFLOP",
        better=-1,
        unit=1e9,
        group=COST,
    ),
    "server_gigaflops": Measure(
        "server_flops",
        TOTAL,
        "Server GFLOP",
        "of the whole run: training that the server does alone, as on a public slice "
        "before the first round, forward and backward; averaging is not counted",
        better=-1,
        unit=1e9,
        digits=2,
        group=COST,
        zero_wins=False,
        trivial=0.0,
    ),
    "answer_kiloflops": Measure(
        "answer_flops",
        LAST,
        "kFLOP an answer",
        "of one test example, forward: what all share and the A experts that the gate "
        "chooses, as global and personal accuracy ask; a dense model is one expert",
        better=-1,
        unit=1e3,
        group=COST,
    ),
    "soft_answer_kiloflops": Measure(
        "soft_answer_flops",
        LAST,
        "kFLOP a soft answer",
        "likewise with all E experts, as global soft accuracy asks",
        better=-1,
        unit=1e3,
        group=COST,
    ),
    "simulated_minutes": Measure(
        "simulated_seconds",
        TOTAL,
        "Simulated min",
        "of the whole run, each round as long as its slowest client is waited for",
        better=-1,
        unit=60.0,
        of=DEVICES,
        group=COST,
        trivial=0.0,
    ),
    "kilojoules": Measure(
        "compute_joules",
        TOTAL,
        "kJ",
        "of all clients in the whole run, for training and radio",
        better=-1,
        plus=("radio_joules",),
        unit=1e3,
        of=DEVICES,
        group=COST,
        trivial=0.0,
    ),
    "peak_client_parameters": Measure(
        "peak_client_parameters",
        MAX,
        "Peak client parameters, 1,000",
        "the most that one client has in memory, frozen parts and control variates "
        "too, without gradients and activations: the largest client's in a mixture, "
        "every client's in a dense model; rounds before a system's own rule sets in "
        "count",
        better=-1,
        scale=1e-3,
        group=COST,
    ),
    **{f"total_{field}": Measure(field, TOTAL, running=True) for field in SUMMED},
    "total_simulated_seconds": Measure(
        "simulated_seconds", TOTAL, running=True, budget="simulated_seconds_to"
    ),
    "total_joules": Measure(
        "compute_joules", TOTAL, plus=("radio_joules",), budget="joules_to"
    ),
    "megabytes": Measure(
        "bytes_up", TOTAL, plus=("bytes_down",), unit=1e6, budget="megabytes_to"
    ),
    "mean_dropped_clients": Measure("dropped_clients", MEAN),
    "mean_simulated_seconds": Measure("simulated_seconds", MEAN),
    "diverged": Measure(
        "diverged",
        MAX,
        "Diverged",
        "runs in which half or more of a round's updates were not finite, or the "
        "training loss ran away to ten times that of the first round; † marks the "
        "means that include them",
        better=-1,
        digits=2,
        trivial=0.0,
        printed=True,
    ),
    "drift_alarms": Measure("drift_alarms", TOTAL),
    "nonfinite_clients": Measure("nonfinite_clients", TOTAL),
}
ALLOWED = {
    "over": ("", FINAL, MEAN, TOTAL, MAX, LAST),
    "better": (-1, 0, 1),
    "of": ("", EXPERTS, DEVICES),
    "group": (LEARNING, COST),
    "varies_over": ("", ROUNDS, LABELS),
}


def check_measure(key: str, measure: Measure) -> None:
    """Checks one row of a table of measures.

    Raises:
      UserError: a field has a value that it does not allow.
    """
    for name, allowed in ALLOWED.items():
        if (value := getattr(measure, name)) not in allowed:
            names = ", ".join(map(repr, allowed))
            raise UserError(f"measure {key}: {name}={value!r}; allowed: {names}")


def running_fields(measures: Mapping[str, Measure]) -> tuple[str, ...]:
    """Fields of which every row also has the sum so far."""
    return tuple(measure.field for measure in measures.values() if measure.running)


def evaluated_fields(measures: Mapping[str, Measure]) -> tuple[str, ...]:
    """Fields of an evaluation that become fields of its row."""
    return tuple(measure.field for measure in measures.values() if measure.evaluated)


def pack_measures(measures: Mapping[str, Measure]) -> dict[str, dict[str, Any]]:
    """The table as `summary.json` holds it: what differs from the defaults."""
    return {key: _pack(measure) for key, measure in measures.items()}


def _pack(record: Measure | Curve) -> dict[str, Any]:
    fields, defaults = record._asdict().items(), record._field_defaults
    tree = {k: v for k, v in fields if k not in defaults or v != defaults[k]}
    return {k: _pack(v) if isinstance(v, Curve) else v for k, v in tree.items()}


def unpack_measures(tree: Mapping[str, Any], path: Path) -> dict[str, Measure]:
    """The table that `pack_measures` has written.

    Args:
      tree: as read from JSON.
      path: of the file, for messages.

    Raises:
      UserError: it is no such table.
    """
    try:
        measures = {key: _unpack(fields) for key, fields in tree.items()}
        for key, measure in measures.items():
            check_kinds(measure)
            check_measure(key, measure)
    except (TypeError, AttributeError, UserError):
        raise UserError(
            f"{path} is damaged: measures hold no table of measures; restore it"
        ) from None
    return measures


def check_kinds(record: Measure | Curve) -> None:
    """Raises TypeError unless every field is of the kind of its default, or text."""
    for name, value in record._asdict().items():
        default = record._field_defaults.get(name, "")
        if name == "curve" and value is not None:
            check_kinds(value)
        elif name == "trivial":
            if not (value is None or is_number(value)):
                raise TypeError(name)
        elif isinstance(default, tuple):
            listed = isinstance(value, tuple)
            if not listed or not all(isinstance(item, str) for item in value):
                raise TypeError(name)
        elif not fits_kind(value, default):
            raise TypeError(name)


def _unpack(fields: Mapping[str, Any]) -> Measure:
    tree: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()
    }
    if "curve" in tree:
        tree["curve"] = Curve(**tree["curve"])
    return Measure(**tree)
