"""What is asked, which stages follow from it, and the Prefect flows that run them. May import every other room.

* `spec/`       what users write: runs, nights, steps; read and checked here
* `run/`        one run: where its sources are, its stages, the preflight, the flow; read `stages` first
* `night/`      many runs: a matrix of specs, gates, regressions against the last good night
* `records/`    what was recorded: looked up, compared, verified, kept or cleared
* `watch/`      what runs now, followed from another terminal
* `checkpoints/` a checkpoint taken out of a run: formats, model card
* `runtime/`    Prefect's server and settings, task runners, signals, processes
* `serve/`      schedules and deployments
* `commands/`   the command line, one file per group of commands; `topics/` is what `slimline help` shows
"""
