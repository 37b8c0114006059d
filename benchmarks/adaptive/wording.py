"""What the report's pages say around their tables."""

from __future__ import annotations

CHOSEN = (
    "The learner's settings are the library's defaults; choices that are made here are made on validation rows, and "
    "where hindsight is a control it is called that. How fine coefficients are is said with each figure: the library's "
    "default for it (by layer from 40 rows on) came after these pages, by their validation rows. Its search for a start and its "
    "label noise with fewer than four rows a class came after them too: the validation rows of emoji and sentiment do not speak "
    "against them ([where the learner begins](adaptive-sentiment.md#where-the-learner-begins)){search}. "
)
SEARCHED = {
    "near_noise": "searched from 0.7 to 1.4 times the weight at which the merge is as long as an adapter, one answer of ten "
    "taken to be by chance, as the library does with fewer than four rows a class",
    "scale": "searched from 0.4 to 1.8 times the weight at which the merge is as long as an adapter, as the library did when "
    "this was run",
}
NARROWED = {
    "near_noise": "; all that gradients learn here from one or two rows a class has both, but for the column from c = 0 and "
    "where starts are compared",
    "scale": "; what is learned here from one or two rows a class had the wide search, and no noise",
}
UNSEEN = "Nothing here was tuned on test rows."
SEEN_PAGES = ("emoji", "sentiment")
SEEN = (
    "The learner's start was changed after test figures of this page had been seen: at first the search went over 0.15 to 0.9 "
    "b_max, then over 0.4 to 1.8 times the weight at which the merge is as long as an adapter, and with few rows over 0.7 to 1.4 "
    "times it; label noise came last. This benchmark is no blind test of any; of the first change "
    "[multiemo4](adaptive-multiemo.md), run after it, is."
)
POSTER = (
    "Final accuracy, %: the mean over domains after all of them; ± is the standard deviation over seeds. Learned: "
    "one row a class and domain, one coefficient an adapter, from the best uniform scale on the buffer, {search}. Task "
    "arithmetic is the rule `linear`; the others have density 0.2. Hindsight chooses W on the test rows among "
    "{count} values from {first:g} to {last:g}."
)
CONTROLS = (
    "Points, with the 95 % t interval over seeds, paired by seed; the test rows are the same for all seeds, so what"
    ' another draw of them would change is not in the interval. "From c = 0" is the poster\'s start, without label noise '
    "and on the first draw alone."
)
OTHERS = "Final accuracy, %. What uses the buffer's rows without their labels says so."
BEGUN = {
    "near_noise": "With one and two rows the learner has the near search and label noise, with more the wide search and none, as "
    "the library does: lines from 2 to 5 cross that. ",
    "scale": "",
}
BUFFERS = (
    "Final accuracy, %, over the seeds that each has, and differences over those that both have, with 95 % t intervals; "
    "one draw of the buffer's rows a seed. {few}Fixed W: one weight for all adapters, the one of the grid that all validation "
    "rows choose.\n\n"
    "![buffers, fixed weights, growth](adaptive-{page}.png)"
)
PATH = (
    "Points; forgetting as in Chaudhry et al. 2018, backward and forward transfer as in Lopez-Paz & Ranzato 2017; "
    "orders are averaged within a seed. The rows that the buffer draws and all rules here do not depend on the "
    "order in which domains came, so the final accuracy is one for all orders; the way to it is not."
)
COLLAPSE = (
    "In factors space A and B are merged apart: dW = sum_i B_i A_i + sum_{i≠j} B_i A_j. Cross / sum is the ratio of"
    " the norms of these two, at every W, since both grow in proportion to W; no adapter was trained for the cross "
    "terms. In delta space there are none, and what is left is the length of the step: the norm of dW at W = 1 over"
    " that of one adapter. W of an adapter's norm: the weight at which the merge is as long as an adapter, known "
    "without data; best W is the best of the grid on test rows."
)
HEADS = (
    "Final accuracy, %. Random: drawn from the seed and never trained (the authors'). Learned: trained on the first"
    " domain of the first order, then frozen (joint training trains its own). Prototypes: class means of the "
    "buffer's features under the merge; joint training and own adapters have those of 20 rows a class."
)
RANKS = (
    "The learned merge cut to a rank, as an adapter on disk has one, against the uncut merge of the same seeds; final accuracy, "
    "%. A linear merge of four adapters of rank 8 has rank 32: that is no cut."
)
LONG = (
    "Whether the library's 60 steps are enough where there are many rows and coefficients: 20 rows a class, b_max = 3, a quarter "
    "of the rows held out, which picks the step. To be decided on validation rows; test rows beside. Differences in points, with "
    "95 % t intervals, paired by seed."
)
NOISY_MORE = (
    "Whether one answer of ten should be taken to be by chance with four rows a class and more, too: b_max = 3, a quarter "
    "of the rows held out, which picks the step by the same likelihood. To be decided on validation rows; test rows beside. "
    "Differences in points, with 95 % t intervals, paired by seed."
)
UNTRAINED = (
    "A buffer keeps rows that its domains' adapters were trained on and may fit well under any coefficients. Final "
    "accuracy, %, on test rows, of coefficients learned from such rows and from as many rows that no adapter has seen "
    "(texts beyond the training limit, images of the validation split); b_max = 3; differences in points with 95 % t "
    "intervals, paired by seed."
)
STARTS = (
    "A check on validation rows (no test row is looked at) where the learner should begin: coefficients by adapter, one row a "
    "class. Accuracy in %, ± the standard deviation over seeds; differences in points, with 95 % t intervals over seeds, runs (a "
    "merge, a draw of the buffer's rows and a b_max) averaged within a seed. Lowest run: of all, the least accurate one. "
    "Draws apart: the standard deviation over the draws of a seed."
)
GROWTH = (
    "One seed, alone on the device{devices}. Seconds and bytes are of the learner and its terms; accuracy is over "
    "the domains merged."
)
JUDGED = (
    "float32 (TF32 products on a GPU). Everything is judged uncut, before any cast or cut to a rank, unless a table"
    " says otherwise."
)
EVENED = (
    "The shift of a merge's answers over the buffer's inputs, taken out of it without their labels (ours; docs/tada.md): "
    "the merge at the rank that its adapters' ranks sum to, one module of it changed. That cut, and the cast to 16 bits, is in "
    "the difference too: as they are, merges are uncut. Joint training is given the same. Final accuracy, %; differences with "
    "95 % t intervals, paired by seed; random head, b_max = 3."
)
