"""What docs/troubleshooting.md says beside the messages themselves. tests/helpers/troubleshooting.py makes the page.

Each status, cause, verdict and warning has an entry here. An error has one where its message alone is not enough.
"""

from __future__ import annotations

from typing import NamedTuple


class Explanation(NamedTuple):
    """What a message means and what to do.

    Attributes:
        words: A part of the message, or several parts of which one occurs in each message that this explains.
        meaning: What it means; a sentence or two.
        remedy: What to do; empty in the list of errors if the message says it.
    """

    words: str | tuple[str, ...]
    meaning: str
    remedy: str = ""

    def matches(self, text: str) -> bool:
        """Whether this explains a message."""
        return any(part in text for part in ([self.words] if isinstance(self.words, str) else self.words))


# Messages without words of their own, as (module, text), and where their words come from.
SAID_ELSEWHERE = {
    ("callbacks.hypergradient", "‹summary›"): "the summary, see SUMMARY",
    ("core.rewindable", "‹name›"): "an AttributeError that Python asks for, which nobody sees",
    ("hypergradients.implicit", "‹unknown›"): "the cause UNKNOWN_WEIGHTS",
    ("runtime.verification", "‹user›: ‹name› ‹doubt›"): "the phrases of _doubts",
}

# symptom, where to look first, what it usually is
SYMPTOMS = (
    (
        "Anything",
        "`TrainingReport()` among the callbacks, and [its page](callbacks/report.md)",
        "It names the most likely fault first, with numbers and a remedy.",
    ),
    (
        "Hyperparameters do not move",
        "the last lines of the console, `callback.summary()`; then `hypergrad/norm` and `hypergrad/skipped` in the log",
        "Too few hyper steps ([no hyper step](#hyper-steps)), all of them skipped (next row), a gradient of zero "
        "([zero right-hand side, no influence](#causes)), a value that is cut off ([summary](#the-summary)), or an "
        "optimizer of your own whose rate is too low: raise it, or leave out `configure_hyper_optimizer`.",
    ),
    (
        "Training does not learn, or accuracy is bad",
        "the training loss, `TrainingReport`, and the highest `edge_ratio` of "
        "[SharpnessMonitor](callbacks/sharpness.md#is-my-learning-rate-too-high); then the same run with "
        "`freeze_hyperparameters()`",
        "If it is bad with frozen hyperparameters, too, tuning is not to blame: look at the learning rate first, and "
        "then at the labels. Let [ExactGeN](callbacks/learning_rate.md) choose the rate. If tuning makes "
        "it worse, read the [summary](#the-summary).",
    ),
    (
        "`not enough values to unpack (expected 3, got 2)`",
        "the loss in which it arises, and what its batches have",
        "In the training loss: the training set is not wrapped in `IndexedDataset`, which adds the index.",
    ),
    (
        "`too many values to unpack (expected 2)`",
        "the loss in which it arises, and what its batches have",
        "In the outer or the validation loss: their data are wrapped in `IndexedDataset`, too. Wrap the training set "
        "alone, after it was split.",
    ),
    (
        "Solves are skipped",
        "`hypergrad/skipped`, `summary().skipped` and the one warning of the fit",
        "The warning names the [status](#statuses) and the [cause](#causes). Most often it is negative curvature: "
        "mark the outputs, or keep the default solver.",
    ),
    (
        "The outer loss falls, but validation does not improve",
        "`summary()` with `held_out_dataloader=`",
        "The hyperparameters learn the outer examples by heart, outer examples are "
        "[training examples](#data), or the fall [comes from training](#the-summary) and not from tuning.",
    ),
    (
        "The outer loss stays at ln C, that of guessing: 2.3 for ten classes, .69 for two",
        "the outer data: show some examples with their labels, and the accuracy on them",
        "Outer labels were shuffled or belong to other inputs, have another coding than the training labels, or inputs "
        "are scaled in another way. If the training loss stays there, too, look at the learning rate.",
    ),
    (
        "Out of memory",
        "the first lines of the error: in a hyper step, a measurement or a training step?",
        "A hyper step needs a second graph and some vectors as long as the weights. A smaller outer batch, "
        '`curvature="finite_difference"` or `SAMA()` needs less; `every_n_batches` changes nothing here. For '
        '`SharpnessMonitor`, `method="power_iteration"` keeps four vectors only. `Direct()` builds a dense matrix.',
    ),
    (
        "Slower than expected",
        "the share of time in the summary, and [what a hyper step costs](benchmarks.md)",
        "Raise `every_n_batches`, or set `max_overhead`. Mark the outputs, because Gauss–Newton products are cheaper. "
        "Replace a solver with many products by the default. [Finite differences](#losses-and-derivatives) in place "
        "of a curvature cost more, too. `ExactGeN` looks some 64 times until its rate has settled.",
    ),
    (
        "An error before the first batch",
        "the [table of errors](#errors), under *runtime* and *callbacks*",
        "All checks of the set-up are made there on purpose: what the losses depend on, who owns which tensor, "
        "what the strategy and the precision allow.",
    ),
    (
        "NaN",
        "which number became NaN first: the training loss, the outer loss, or a hypergradient?",
        "A NaN never reaches a hyperparameter: the status is [`nonfinite`](#statuses) and the hyper step is skipped. "
        "`[i for i, (x, *_) in enumerate(data) if not x.isfinite().all()]` lists the examples that have one. "
        "If training itself diverges, look at its learning rate, and at a decay or a loss weight of your own that has "
        "no upper bound. `WeightDecay` has one.",
    ),
    (
        "A resumed run differs",
        "the warning about [skipped outer batches](#data)",
        "A run repeats bit for bit if its loaders resume exactly inside an epoch, its kernels are deterministic, and "
        "`max_overhead` is None: a budget of time depends on the clock, and `SharpnessMonitor` has one by default, "
        "which changes when it measures and never what training does.",
    ),
)

# status: what it means, what to do
STATUSES = {
    "CONVERGED": (
        "A product has shown that the residual is below `rtol`, or is only rounding where no `rtol` was given.",
        "Nothing. It says that the linear system is solved, not that the weights are at a minimum; that is told by the "
        "diagnosis.",
    ),
    "COMPLETE": (
        "All products that were asked for are done, and no tolerance was set. This is the normal end of `Amortized`, "
        "`Neumann`, `Identity` and `SAMA`.",
        "Nothing. On a fixed problem, read `relative_residual`. In minibatch training it "
        "[says little](theory.md#why-residuals-say-little-there).",
    ),
    "MAX_ITERATIONS": (
        "Products ran out, or more of them would not help, and the residual is above `rtol`.",
        "Read the cause: it may be too few iterations, rounding, or a singular matrix. If a rough answer is enough, "
        "use `rtol=None`, which ends as `complete`.",
    ),
    "NEGATIVE_CURVATURE": (
        "The loss curves downward along some direction, so that the weights are not at a minimum. For the Hessian of a "
        "network in training this is the rule.",
        "Mark the outputs, so that Gauss–Newton curvature is used, or raise the damping.",
    ),
    "DIVERGED": (
        "The terms of a series grow, because its step is too long. You get the sum before the first term that grew.",
        'Use `step_size="auto"`, or a shorter step.',
    ),
    "NONFINITE": (
        "NaN or infinity came in, or arose on the way. The solution is zero, and no setting of `on_failure` uses it.",
        "The cause names the first quantity that is not finite. Begin there.",
    ),
}

# cause: when you meet it, what to try first. What it means and all remedies stand in docs/diagnoses.md.
CAUSES = {
    "STEP_TOO_LONG": (
        "`Neumann` or `Identity` with a step of your own, or training beyond its edge of stability.",
        '`Neumann(step_size="auto")`',
    ),
    "NEGATIVE_CURVATURE": (
        "Conjugate gradients or a series on the Hessian of a network that is still in training.",
        "`mark_outputs`; outside a fit, train further first",
    ),
    "SINGULAR": (
        "Weights that can change together without changing the loss, and an outer loss that asks for such a change.",
        "a little damping",
    ),
    "ILL_CONDITIONED": (
        "A solver with an `rtol` on a loss that is steep in some directions and nearly flat in others.",
        "more iterations, or `preconditioner=Nystrom(rank)` if a few eigenvalues stand out",
    ),
    "ROUNDING": (
        "A small `rtol` in float32, or finite differences.",
        "a larger `rtol`; float64 to check a result",
    ),
    "NOT_THE_SAME_MAP": (
        "A loss that keeps a counter, reads a queue, or draws from a generator that is not torch's.",
        "move that out of the loss",
    ),
    "NOT_SYMMETRIC": (
        "A custom `autograd.Function`, a hook that changes gradients, or gradient reversal.",
        "`check_hypergradient` on a small case, to see the size of the error",
    ),
    "NOT_FINITE": (
        "A norm or a square root at zero, the logarithm of zero, half precision, or a run that has diverged.",
        "evaluate the named loss on the named batch by itself",
    ),
    "OVERFLOW": (
        "A series without its safeguard, or losses of a very large scale in half precision.",
        "the safeguard, or another solver",
    ),
    "ZERO_RIGHT_HAND_SIDE": (
        "An outer loss of a copy of the weights, or under `torch.no_grad()`; a loss that has saturated at zero.",
        "call `outer_loss` on a batch and look at its `grad_fn`",
    ),
    "NOT_AT_MINIMUM": (
        "`implicit_hypergradient` outside a fit, after too few training steps or with another batch.",
        'train further, or `damping="horizon"`',
    ),
    "NOT_ITS_GRADIENT": (
        "A stopped target, a straight-through estimator, or a policy gradient.",
        "decide whether the detached part matters; if not, the result is usable",
    ),
    "NO_INFLUENCE": (
        "A learning rate; a hyperparameter that only the optimizer or the validation uses; a value that a clamp cuts "
        "off.",
        "use it in the training loss, or take `ExactGeN` for a learning rate",
    ),
    "UNKNOWN_WEIGHTS": (
        "The inner loss sees a copy of the weights, or a head that only the outer loss uses is among them.",
        "pass the tensors that the inner loss uses",
    ),
}

# verdict: what it rests on, what to do
VERDICTS = {
    "helped": (
        "Later hypergradients confirm a fall of the outer loss that is far larger than its error, and neither the "
        "outer nor the held-out loss has risen.",
        "Report results from data that neither training nor tuning has seen.",
    ),
    "did nothing": (
        "There was no hyper step, the hyperparameters moved very little, or the fall is due to training.",
        "Train longer or make hyper steps more frequent. If the values moved and nothing changed, they do not matter.",
    ),
    "harmed": (
        "Later hypergradients confirm a rise, the outer loss exploded, or training diverged.",
        "Compare with a run after `freeze_hyperparameters()`. Leave out `configure_hyper_optimizer`, or lower its "
        "rate.",
    ),
    "unclear": (
        "What is confirmed is no larger than its error, a loss ends higher than it began, or outer examples are those "
        "of training.",
        "Compare with a run after `freeze_hyperparameters()`: only a second run can tell.",
    ),
}

# sentences of the summary
SUMMARY = (
    Explanation(
        "The hyperparameters are as they were.",
        "Every hyper step was skipped, so that nothing moved.",
        "The number and the cause of the skipped ones stand in the first line.",
    ),
    Explanation(
        "By the hypergradients that followed",
        "The evidence for the verdict: what later hypergradients say about earlier steps, ± one standard error, and "
        "what those steps had predicted. See [the theory](theory.md#predicted-and-confirmed).",
        "Read its sign, and how far it is from zero; the gain of the whole run may be several times as large or small. "
        "If much less is confirmed than predicted, single steps are longer than a first-order estimate holds, as "
        "where weights reach their bounds. That is harmless where the loss falls.",
    ),
    Explanation(
        "training diverged",
        "The outer loss at the end is NaN or infinite.",
        "Find out whether training diverges with frozen hyperparameters, too. If not, give them an upper bound.",
    ),
    Explanation(
        "few; train longer, or",
        "The verdict rests on very few hyper steps.",
        "Do not trust it yet.",
    ),
    Explanation(
        "moved past the best values",
        "The sum of what later hypergradients say is a rise.",
        "Use the default hyper-optimizer, or a lower rate of your own.",
    ),
    Explanation(
        "units in all",
        "The way that the hyperparameters went is short. A unit is a factor of e for a decay.",
        "Train longer, or lower `every_n_batches`: the default optimizer limits how far they go in a horizon of "
        "training steps. With an optimizer of your own, raise its rate or leave it out.",
    ),
    Explanation(
        "The outer loss rose from",
        "It ends several times as high as it began.",
        "Look at the training loss first: often training itself has become unstable.",
    ),
    Explanation(
        ("by training or by tuning", "loss rose from ‹a› to ‹b›"),
        "Hyper steps look good one by one, but a loss is higher at the end. Overfitting by the weights does this, too.",
        "Compare with frozen hyperparameters.",
    ),
    Explanation(
        "The fall of the outer loss comes from training.",
        "The outer loss fell, and the share of the hyper steps in that is small.",
        "Nothing is wrong. These hyperparameters matter little here.",
    ),
    Explanation(
        "may be true of the outer examples alone",
        "The hypergradients confirm a gain, but the held-out loss is far above the outer one.",
        "See the next row.",
    ),
    Explanation(
        ("says nothing of other data", "Take outer data that training does not see."),
        "The hyperparameters were tuned on the examples that training fits, so that a lower loss means good memory.",
        "Split off outer data, or pass `held_out_dataloader=`, by which the verdict then goes.",
    ),
    Explanation(
        "learn the outer examples by heart",
        "Relative to the outer loss, the gap between held-out and outer loss has grown.",
        "Fewer hyperparameters (one decay for each tensor instead of each weight), more outer data, or a stop by the "
        "held-out loss.",
    ),
    Explanation(
        "No hyperparameter has had a hypergradient",
        "Every hypergradient of the last hyper steps was exactly zero.",
        "Look whether the outer loss still changes, and whether the network is dead (all units at zero).",
    ),
    Explanation(
        "stands at its bound",
        "The outer loss would go on falling beyond the bound.",
        "Raise `maximum` if a larger value makes sense. For a decay, the bound also keeps training stable.",
    ),
    Explanation(
        "had the same hypergradient at the first hyper step",
        "The entries of a table, such as weights of examples, cannot be told apart.",
        'Take losses with `reduction="none"`, multiply each by its entry, and then take the mean.',
    ),
    Explanation(
        "as each hyper step reaches the same ones",
        "A table is read by the place of an example in its batch, so that only as many rows are used as a batch has.",
        "Use the index that `IndexedDataset` adds to each example.",
    ),
    Explanation(
        ("No hypergradient of ‹what›", "tensors of ‹name›", "cuts it off for good", "belongs to weights that do not"),
        "This one has had a gradient of exactly zero for many hyper steps.",
        "Register positive numbers as `Positive(initial)` instead of clamping them, and leave out parts that belong to "
        "frozen weights.",
    ),
)

# section of the page: its warnings
WARNINGS = {
    "Hyper steps": (
        Explanation(
            "ended with status",
            "The solve failed, and the message goes on with the cause, the numbers and the remedies.",
            'See [statuses](#statuses) and [causes](#causes). With `on_failure="raise"` the same words are an error.',
        ),
        Explanation(
            "is doubtful",
            "The solve succeeded, but its outer loss is far out of the usual range; the reason follows.",
            'See the next entry. With `on_failure="raise"` the same words are an error.',
        ),
        Explanation(
            "by the statistics of the same batch",
            "The outer loss is evaluated in eval mode, where BatchNorm uses running statistics. Early in training "
            "these can be far from what the weights need, and the loss is then meaningless. Such a hyper "
            "step is not made.",
            "Use `start_after_batches` to let the statistics settle. If it goes on, lower the learning rate.",
        ),
        Explanation(
            "ran out of memory",
            "The memory of this hyper step was not there, and training goes on without it. With several processes this "
            "is an error.",
            "A smaller outer batch, finite differences, or a solver without second derivatives, `SAMA()`.",
        ),
        Explanation(
            "It is skipped; further ones are not reported",
            "The hyperparameters stay as they are at this hyper step. You see the first case only.",
            "`hypergrad/skipped` counts them, and `summary().skipped` counts each cause. A few are harmless.",
        ),
        Explanation(
            "It is used nevertheless",
            'You chose `on_failure="use"`, and a result of a failed solve moves the hyperparameters.',
            "Watch `hypergrad/norm`: a solve that met negative curvature can be far too long.",
        ),
        Explanation(
            "hyper step ‹step›: ‹diagnosis›",
            "The solve is fine, and the outer loss does not depend on the weights. Only that diagnosis is told in this "
            "way during a fit.",
            "See *zero right-hand side* under [causes](#causes).",
        ),
        Explanation(
            "nothing tunes the hyperparameters",
            "A notice at the start: the hyperparameters are as they were registered, and no callback moves them.",
            "Add `IFTHypergradient()` to the callbacks. `freeze_hyperparameters()` says that they are to stay.",
        ),
        Explanation(
            "made no hyper step",
            "The fit ended before the first hyper step was due.",
            "Lower `every_n_batches` or `start_after_batches`, or train longer. Batches without a loss do not count.",
        ),
        Explanation(
            "moves the hyperparameters hardly at all",
            "A notice at the start: the run is too short to tune anything.",
            "Train longer, or make hyper steps more frequent. For a test of your code it is of no importance.",
        ),
        Explanation(
            "would have moved the hyperparameters by",
            "A step of your own hyper-optimizer was so long that training could not follow, and a step of the default "
            "one took its place. `summary().replaced` counts such steps.",
            "Lower the learning rate of your hyper-optimizer, or use the default, which has none.",
        ),
        Explanation(
            "have the same one, so that they act as",
            "The entries multiply a mean that was taken already, so that the outer loss cannot tell one example from "
            "another.",
            'Take losses with `reduction="none"`, multiply each by its entry, and then take the mean.',
        ),
        Explanation(
            "was unfrozen during training",
            "Something called `requires_grad_(True)` on hyperparameters, as fine-tuning callbacks do on whole modules. "
            "They were frozen again, so that training does not move them.",
            "Unfreeze `self.inner_parameters()` only.",
        ),
        Explanation(
            "outer_loss depends on hyperparameter",
            "A penalty or a weight that is made for the training loss is part of the outer loss, too. The easiest way "
            "to lower it is then to shrink the penalty, which teaches nothing.",
            "Compute `outer_loss` without it.",
        ),
        Explanation(
            "could not measure the",
            "Training is done and the hyperparameters are tuned. Only a number of the summary is missing.",
            "Call `outer_loss` on that data and see why it fails.",
        ),
    ),
    "Data": (
        Explanation(
            "no outer_dataloader() is defined",
            "The validation data tune the hyperparameters, so that validation results are too good.",
            "Split off outer data, or report results from other data.",
        ),
        Explanation(
            "outer examples are training examples",
            "On such examples a low loss means good memory, so that a decay, say, is tuned towards zero.",
            "Split the data once, with `random_split`, and use one part for each.",
        ),
        Explanation(
            "its rows are not those of the training examples",
            "A table with a row for each training example has more rows than there are examples, so that a row may "
            "belong to another example than you think, and the last ones stay as they are. Too few rows are an error.",
            "Split first, wrap the training part in `IndexedDataset`, and create the table with its length.",
        ),
        Explanation(
            "every rank iterates over the whole outer loader",
            "The loader could not be split, so that all processes read the same outer batches. Results are right, and "
            "rest on fewer outer examples than they could.",
            "Nothing, or a map-style `DataLoader` with an ordinary sampler.",
        ),
        Explanation(
            "outer batches are skipped",
            "To go on where the checkpoint was written, the loader is read from its start. If its order is random, the "
            "resumed run sees other batches.",
            "A map-style `DataLoader` with an ordinary sampler resumes exactly and reads nothing in vain.",
        ),
        Explanation(
            "cannot tell the number of examples in a batch",
            "Processes are weighted by their numbers of examples, and these are not known here.",
            "Nothing if all batches have the same size. Else yield tensors in tuples, lists or dicts.",
        ),
    ),
    "Losses and derivatives": (
        Explanation(
            "uses curvature='finite_difference' in place of",
            "A second derivative is missing, incomplete or wrong, and the message says which. Differences of gradients "
            "replace it, at more cost and with more noise.",
            "Nothing, if the run is fast enough. Else replace the operation that is named, or choose a smooth "
            "activation such as GELU in place of ReLU.",
        ),
        Explanation(
            "finite differences in ‹dtype› are not reliable here",
            "The step of the difference crosses kinks of ReLU, or drowns in rounding. Products are then noise.",
            "Use float64, the Hessian or Gauss–Newton curvature. Do not trust hypergradients of this run.",
        ),
        Explanation(
            "is not the same function twice",
            "Two evaluations on the same batch, at the same weights and with the same random numbers differ. Products "
            "are then not products with one matrix.",
            "Find what the loss reads and changes outside of the module, and move it out of the loss.",
        ),
        Explanation(
            "does not change along its gradient as the gradient says",
            "A part of the loss is detached on purpose, or a backward pass is not the derivative. ExactGeN then "
            "compares gradients instead of losses.",
            "Nothing, if it is meant so. Else look for `.detach()` and for custom backward passes.",
        ),
        Explanation(
            "does not change with the hyperparameters as its derivative says",
            "A part of the loss that depends on hyperparameters is detached, so that hypergradients miss its effect.",
            "Remove the `.detach()`, or accept that this part counts as constant.",
        ),
        Explanation(
            "are differentiated under autocast",
            "The losses cannot be evaluated in float32, often because a layer is in half precision. Hypergradients "
            "then have the precision of training.",
            "Nothing, or keep all layers in float32 and let autocast choose.",
        ),
        Explanation(
            "the update rule of ‹class of optimizer› is not known",
            "The horizon needs to know how far one step goes, and this optimizer counts as gradient descent.",
            "Use SGD, Adam, AdamW, NAdam, RMSprop or Adagrad, or set a number as `damping`.",
        ),
    ),
    "SharpnessMonitor": (
        Explanation(
            "a measurement failed, and training goes on",
            "In a single process the monitor never ends a fit. The error that it met is part of the message.",
            "Read the error. `failures` in the log counts how often it happens.",
        ),
        Explanation(
            "training is about to diverge",
            "The step of the optimizer raises the loss that it should lower, and it is the first step, or the loss has "
            "doubled within ten batches.",
            "Lower the learning rate, or take `ExactGeN`. Later alarms are counted in `alarms` in the log.",
        ),
        Explanation(
            "number of failed measurements",
            "A notice at the end, with the count.",
            "The first failure was told in a warning.",
        ),
        Explanation(
            "measurements ended above",
            "A notice at the end: eigenvalues are less accurate than you asked for. Their residual is in the log.",
            "Raise `max_iterations`, or accept a larger `rtol`.",
        ),
        Explanation(
            "more rarely than every",
            "A notice at the end: measurements were postponed to stay inside the budget of time.",
            "Nothing, or for a curve a smaller `every_n_batches` and a larger `max_overhead`; None removes the budget.",
        ),
        Explanation(
            "no logger takes figures",
            "The spectrum is not drawn, and no time is spent on it.",
            "Add a logger that takes figures, or set `spectral_density=False`.",
        ),
        Explanation(
            "the stability edge of",
            "The monitor does not know when this optimizer becomes unstable, and shows the plain curvature.",
            "Nothing. With `preconditioned=False` you say that this is what you want.",
        ),
    ),
    "ExactGeN": (
        Explanation(
            "ExactGeN.suggest: ",
            "A notice: the rate that won the race, how many were tried, and the edge above which none was.",
            "Nothing is wrong, unless it says that the lowest or the highest rate is the best, or that many diverged.",
        ),
        Explanation(
            "configure no scheduler",
            "ExactGeN chooses the rate, so that your scheduler has no effect in this fit.",
            "Remove the scheduler, or the callback.",
        ),
        Explanation(
            "omits the final decay",
            "The rate should fall to zero at the end, and the Trainer does not know where the end is.",
            "Set `max_steps` or `max_epochs` with a loader of known length, or `final_decay=0`.",
        ),
        Explanation(
            "the learning rate went from",
            "A notice at the end: the rate after the first look, and the one at the end, before the final decay. It "
            "settles when it hardly grows any more. With the default rule a look cannot be used only if it is not "
            'finite; with `rule="published"` also if the parabola has no lowest point ahead.',
            "Nothing, as a rule. If it has not settled, train longer. If many looks could not be used, look whether "
            "losses are finite.",
        ),
    ),
    "TrainingReport": (
        Explanation(
            "shows how training goes on",
            "A notice at the start, with the address of the page.",
            "Open it in a browser. It is written again while training goes on.",
        ),
        Explanation(
            "TrainingReport: found",
            "A notice at the end: what is wrong with the run, and the address of the page. Of several findings it is "
            "the worst.",
            "Open the page. It has the numbers, what to do, and the other findings.",
        ),
        Explanation(
            "TrainingReport failed, and training goes on",
            "The report met an error, which is part of the message. Training and tuning are not affected.",
            "Read the error, and look whether the folder of the page can be written to.",
        ),
    ),
    "Checkpoints and loggers": (
        Explanation(
            "the checkpoint has no values of",
            "You load a checkpoint from before these hyperparameters were registered, as of the plain class.",
            "Nothing, if they should start at their present values.",
        ),
        Explanation(
            "did not take the tuned values",
            "A logger refused the tuned values as hyperparameters of the run. MLflow takes each one only once.",
            "Nothing: they are in the checkpoint, and in `module.hyperparameter_values()`.",
        ),
    ),
}

# errors whose message is not enough
ERRORS = (
    Explanation(
        "its rows are not those of the training examples",
        "`random_split(IndexedDataset(data))` gives indices into the whole of `data`. Wrap the part after the split.",
    ),
    Explanation(
        "implicit differentiation cannot tune it",
        "In a fit this comes before the first batch. The usual reason is a learning rate or a setting of an optimizer.",
    ),
    Explanation("on the first batch; check the data", "Nothing has been trained or tuned yet."),
    Explanation(
        "no batch has had a loss yet", "It does not leave the package: the hyper step waits for the next batch."
    ),
    Explanation(
        "the training loss is None on a batch",
        "With one process such a batch is simply left out.",
    ),
    Explanation(
        "NaN or infinity in the curvature", "It becomes a warning of `SharpnessMonitor`, and training goes on."
    ),
    Explanation(
        "curvature='kfac' needs all examples in one process",
        "A loss scale belongs to float16; use bfloat16 or float32.",
    ),
    Explanation(
        "is spread over processes",
        "Hyperparameters have to be whole on each device, because each hyper step reads all of them.",
    ),
    Explanation(
        "requires a gradient and is also in the optimizer",
        "An optimizer of `self.parameters()` is fine as long as nothing unfreezes the hyperparameters.",
    ),
    Explanation(
        "differ from differences of its gradients",
        "Inside a fit, and in float32, finite differences take over with a warning. `weight_norm` of torch is a "
        "known case.",
    ),
    Explanation(
        "has no second derivative (",
        "Inside a fit, and in float32, finite differences take over with a warning.",
    ),
    Explanation(
        "whose backward pass can be differentiated only once",
        "Inside a fit, and in float32, finite differences take over with a warning.",
    ),
    Explanation(
        "where torch.autograd.grad does not find them",
        "Finite differences would miss these weights, too, so that there is no replacement.",
    ),
    Explanation(
        "are not symmetric: v·Au",
        "Differences of gradients are tried first. If they are not symmetric either, there is no loss to speak of.",
    ),
    Explanation(
        "returned None, so there is no loss",
        "The callbacks catch it and wait for the next batch, as training does.",
    ),
    Explanation(
        "hypergradient differs from the",
        "If weights are far from a minimum, the reference by solving the inner problem again must differ.",
    ),
    Explanation(
        "Newton's method did not solve the inner problem",
        "This reference needs a small inner problem with a minimum near the present weights.",
    ),
    Explanation(
        "a decay of 2/lr",
        "An upper bound that training survives is part of a decay, because tuning may go there.",
    ),
    Explanation(
        "needs the whole model on each device",
        "[What is supported](support.md) lists the strategies.",
    ),
    Explanation(
        "optimizes manually, so its training_step",
        "The callback evaluates the loss again, and a manual `training_step` would make a step each time.",
    ),
    Explanation(
        "is not linear in its learning rate",
        "Rprop and Adafactor are such optimizers.",
    ),
    Explanation(
        "function of torch._foreach",
        "This happens on a GPU only.",
    ),
    Explanation(
        "there is no summary before the end",
        "After Ctrl-C there is one, if hyper steps were made.",
    ),
)
