"""Studies: each trains models to test a claim, and writes one page with the answer.

``python -m benchmarks.studies NAME`` runs one. Each study has a folder: ``study.py``
trains and measures, ``page.md`` is the template of its page, with a field for each
number. ``machinery`` has the code that studies share: resumable runs, data, models,
pages. ``registry.py`` lists the studies. A study is a function of a ``Context`` that
returns a ``Page``; it trains ``Run`` objects:

    def study(context: Context) -> Page:
        corpus = context.corpus(pieces=4000)
        train = context.batches(corpus.encode(corpus.split.train))
        dev = context.batches(corpus.encode(corpus.split.dev))
        run = Run(
            name="additive",
            config={"hidden_size": 256, "data": corpus.fingerprint},
            make_model=lambda: Translator(256, rngs=nnx.Rngs(0)),
            loss=forced(logits, smoothing=0.1),  # logits(model, batch) -> [B, T, V]
            batch_at=train.batch_at,
            optimiser=adam(1e-3, steps=5000, warmup=500),
            steps=5000,
            evaluate=MeanLoss(forced(logits), dev.all(), context.mesh),
            evaluate_every=250,
        )
        runs = context.train_all([run, ...])
        if runs is None:  # --only leaves out some that are not done yet
            return None
        model = runs["additive"].model  # of the best evaluation
        ...
        return Page(Path(__file__).with_name("page.md"), {"loss": ...}, ...)

Everything that affects a result is in ``Run.config`` or in ``Run`` itself, and a step
is a pure function of the state and the step's number. So a run that was killed and is
continued with ``--resume`` gives bit for bit the same results.

A study writes into ``--out DIR``: ``NAME.md``, ``NAME.json``, ``NAME-*.svg``, and for
each run ``runs/NAME/RUN/`` with ``config.json``, ``log.jsonl``, ``summary.json`` and
``checkpoints/``.
"""
