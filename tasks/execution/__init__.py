"""How a stage is run, whichever it is.

* `stage`           the Prefect task: found in the store, fetched, or made under a lock; start here
* `context`         what a stage is given (StageContext, RunContext) and gives back (StageResult)
* `retries`         what passes by itself (`transient`) is tried again, with smaller batches after memory was short
* `interrupts`      a signal ends what can go on later, and starts nothing new
* `disk_forecast`   what a stage will write, and whether there is room
* `progress`        a bar in a terminal, an artifact in Prefect's pages
* `curves`          what a training measures at each step, in MLflow while it trains
"""
