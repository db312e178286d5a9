-- What is asked of the tables again and again. Made anew whenever this file changes; no view holds rows of its own.

-- The newest run of each spec.
CREATE OR REPLACE VIEW newest_runs AS
SELECT * FROM runs
QUALIFY row_number() OVER (PARTITION BY name ORDER BY finished_at DESC, run_key) = 1;

-- What decides whether two figures may be compared: the protocol without what only says what else was measured, from
-- which source, and with which installed versions.
CREATE OR REPLACE MACRO deciding(protocol) AS CAST(json_merge_patch(
    protocol,
    '{"versions": null, "data_identity": null, "leaks": null, "windows": null, "normalise": null, "measured": null,
      "bootstrap_iters": null, "ratio": null, "ratio_threads": null, "ratio_precision": null, "ratio_seconds": null}'
) AS VARCHAR);

-- Parameters of each checkpoint: as recorded with it, else as a profile of it counted them.
CREATE OR REPLACE VIEW sizes AS
WITH profiled AS (
    SELECT checkpoint_key,
        max(value) FILTER (metric = 'num_parameters') AS num_parameters,
        max(value) FILTER (metric = 'num_decoder_parameters') AS num_decoder_parameters
    FROM metrics
    WHERE suite = 'profile' AND metric IN ('num_parameters', 'num_decoder_parameters')
    GROUP BY checkpoint_key
)
SELECT c.run_key, c.checkpoint, c.checkpoint_key,
    CAST(coalesce(c.num_parameters, p.num_parameters) AS BIGINT) AS num_parameters,
    CAST(coalesce(c.num_decoder_parameters, p.num_decoder_parameters) AS BIGINT) AS num_decoder_parameters
FROM checkpoints AS c LEFT JOIN profiled AS p USING (checkpoint_key);

-- Every figure of every newest run by one name, "suite/task/metric"; sizes are "size/num_parameters" and so on.
CREATE OR REPLACE VIEW figures AS
SELECT r.name AS spec, m.run_key, m.checkpoint, m.checkpoint_key, concat(m.suite, '/', m.task, '/', m.metric) AS figure,
    m.value, m.stderr, m.num_examples, coalesce(m.higher_is_better, m.metric NOT LIKE 'ppl%') AS higher_is_better,
    m.protocol, r.finished_at
FROM metrics AS m JOIN newest_runs AS r USING (run_key)
UNION ALL
SELECT r.name, s.run_key, s.checkpoint, s.checkpoint_key, 'size/num_parameters', s.num_parameters, NULL, NULL, false,
    '{}', r.finished_at
FROM sizes AS s JOIN newest_runs AS r USING (run_key) WHERE s.num_parameters IS NOT NULL
UNION ALL
SELECT r.name, s.run_key, s.checkpoint, s.checkpoint_key, 'size/num_decoder_parameters', s.num_decoder_parameters,
    NULL, NULL, false, '{}', r.finished_at
FROM sizes AS s JOIN newest_runs AS r USING (run_key) WHERE s.num_decoder_parameters IS NOT NULL;

-- One row per checkpoint of these runs. sparsity: the share of the dense decoder's parameters that is
-- gone. perplexities: all of them by "suite/task/metric"; ppl: the first that the spec asks for. zero_shot_avg: the
-- papers' average of seven tasks, else the plain mean of acc over the tasks that there are.
CREATE OR REPLACE MACRO leaderboard_of(run_keys) AS TABLE
WITH chosen AS (
    SELECT unnest(run_keys) AS run_key
), perplexities AS (
    SELECT run_key, checkpoint,
        map_from_entries(list({'key': concat(suite, '/', task, '/', metric), 'value': value} ORDER BY rowid))
            AS perplexities,
        arg_min(value, rowid) AS ppl,
        arg_min(concat(suite, '/', task, '/', metric), rowid) AS ppl_of
    FROM metrics WHERE metric LIKE 'ppl@%' AND run_key IN (SELECT run_key FROM chosen)
    GROUP BY run_key, checkpoint
), tasks AS (
    SELECT run_key, checkpoint, max(value) FILTER (task = 'average') AS papers_avg,
        avg(value) FILTER (is_task) AS plain_avg, count(*) FILTER (is_task) AS zero_shot_tasks
    FROM (
        SELECT *, num_fewshot = 0 AND task <> 'average' AND task NOT LIKE 'mmlu%' AS is_task
        FROM metrics WHERE metric = 'acc' AND run_key IN (SELECT run_key FROM chosen)
    )
    GROUP BY run_key, checkpoint
), profiles AS (
    SELECT run_key, checkpoint,
        max(value) FILTER (metric = 'latency_ms_p50') AS latency_ms,
        max(value) FILTER (metric = 'prefill_ms_p50') AS prefill_ms,
        max(value) FILTER (metric = 'decode_ms_per_token_p50') AS decode_ms_per_token,
        max(value) FILTER (metric = 'tokens_per_s') AS tokens_per_s,
        max(value) FILTER (metric = 'latency_ratio') AS latency_ratio,
        max(value) FILTER (metric = 'peak_memory_gib') AS peak_memory_gib
    FROM metrics
    WHERE suite = 'profile' AND task = 'profile' AND run_key IN (SELECT run_key FROM chosen)
    GROUP BY run_key, checkpoint
)
SELECT r.name AS spec, c.checkpoint, c.model, c.method, c.recovery, c.variant,
    c.total_sparsity AS sparsity_asked,
    1 - s.num_decoder_parameters / d.num_decoder_parameters AS sparsity,
    s.num_parameters, s.num_decoder_parameters,
    p.ppl, p.ppl_of, p.perplexities, coalesce(t.papers_avg, t.plain_avg) AS zero_shot_avg,
    coalesce(t.zero_shot_tasks, 0) AS zero_shot_tasks,
    m.latency_ms, m.prefill_ms, m.decode_ms_per_token, m.tokens_per_s, m.latency_ratio, m.peak_memory_gib,
    r.status, r.finished_at, c.run_key, c.checkpoint_key
FROM runs AS r
JOIN chosen USING (run_key)
JOIN checkpoints AS c USING (run_key)
LEFT JOIN sizes AS s ON s.run_key = c.run_key AND s.checkpoint = c.checkpoint
LEFT JOIN sizes AS d ON d.run_key = c.run_key AND d.checkpoint = 'dense'
LEFT JOIN perplexities AS p ON p.run_key = c.run_key AND p.checkpoint = c.checkpoint
LEFT JOIN tasks AS t ON t.run_key = c.run_key AND t.checkpoint = c.checkpoint
LEFT JOIN profiles AS m ON m.run_key = c.run_key AND m.checkpoint = c.checkpoint
ORDER BY c.model, r.name, c.rowid;

-- The same of the newest run of each spec.
CREATE OR REPLACE VIEW leaderboard AS
SELECT * FROM leaderboard_of((SELECT list(run_key) FROM newest_runs));

-- The checkpoints that no other beats in both of two figures, each a name of `figures` or a pattern with * ? [..].
-- Only figures of the same name and protocol are set against each other; a checkpoint of several specs counts once.
CREATE OR REPLACE MACRO pareto(size_figure, quality_figure) AS TABLE
WITH once AS (
    SELECT * FROM figures WHERE NOT isnan(value) AND (figure IN (size_figure, quality_figure)
        OR figure GLOB size_figure OR figure GLOB quality_figure)
    QUALIFY row_number() OVER (PARTITION BY checkpoint_key, figure, deciding(protocol) ORDER BY finished_at DESC) = 1
), points AS (
    SELECT s.figure AS size_name, s.value AS size, q.figure AS quality_name, q.value AS quality, q.stderr,
        q.spec, q.checkpoint, q.run_key, q.checkpoint_key, q.protocol,
        concat(deciding(s.protocol), deciding(q.protocol)) AS alike,
        CASE WHEN s.higher_is_better THEN -s.value ELSE s.value END AS cost,
        CASE WHEN q.higher_is_better THEN -q.value ELSE q.value END AS loss
    FROM once AS s JOIN once AS q USING (checkpoint_key)
    WHERE (s.figure = size_figure OR s.figure GLOB size_figure)
        AND (q.figure = quality_figure OR q.figure GLOB quality_figure)
), ranked AS (
    SELECT *,
        min(loss) OVER (upto RANGE BETWEEN UNBOUNDED PRECEDING AND abs(cost) * 0.005 FOLLOWING) AS best,
        min(loss) OVER (upto RANGE BETWEEN UNBOUNDED PRECEDING AND CURRENT ROW EXCLUDE GROUP) AS best_of_smaller
    FROM points
    WINDOW upto AS (PARTITION BY size_name, quality_name, alike ORDER BY cost)
)
SELECT size_name, quality_name, spec, checkpoint, size, quality, stderr, run_key, checkpoint_key, protocol
FROM ranked WHERE loss = best AND (best_of_smaller IS NULL OR loss < best_of_smaller)
ORDER BY size_name, quality_name, size, quality;

-- The same for parameters and every perplexity.
CREATE OR REPLACE VIEW pareto AS SELECT * FROM pareto('size/num_parameters', '*/ppl@*');

-- A figure night after night.
CREATE OR REPLACE VIEW history AS
SELECT n.name AS night, n.started_at, f.cell, f.checkpoint, f.suite, f.task, f.metric, f.value, f.stderr,
    f.num_examples, f.higher_is_better, f.before_value, f.p_value, f.verdict, f.gate, n.status, n.gates_passed,
    n.slimline_version, n.git_revision, f.night_id, f.stage_key
FROM night_figures AS f JOIN nights AS n USING (night_id)
ORDER BY n.name, f.cell, f.checkpoint, f.suite, f.task, f.metric, n.started_at;

-- Which checkpoint was made from which, by what, in how many seconds; path: the checkpoints on the way, the dense one
-- first. Calibration, statistics and orders, which several checkpoints share, are in `stages` and not counted.
CREATE OR REPLACE VIEW lineage AS
WITH RECURSIVE timed AS (
    SELECT c.*, s.seconds, r.name AS spec, c.rowid AS place
    FROM checkpoints AS c JOIN runs AS r USING (run_key)
    LEFT JOIN (SELECT run_key, stage_key, max(seconds) AS seconds FROM stages GROUP BY ALL) AS s
        ON s.run_key = c.run_key AND s.stage_key = c.checkpoint_key
), way AS (
    SELECT timed.*, [checkpoint] AS path, seconds AS total_seconds FROM timed WHERE source IS NULL
    UNION ALL
    SELECT t.*, list_append(w.path, t.checkpoint), w.total_seconds + t.seconds
    FROM timed AS t JOIN way AS w ON w.run_key = t.run_key AND w.checkpoint = t.source
)
SELECT spec, model, checkpoint, source, action, plugin, sparsity, total_sparsity, seconds, total_seconds, path,
    run_key, checkpoint_key, source_key, config
FROM way ORDER BY spec, run_key, place;

-- Pairs of checkpoints of newest runs whose configurations differ in exactly one option.
CREATE OR REPLACE VIEW ablations AS
WITH once AS (
    SELECT c.*, r.name AS spec, c.rowid AS place FROM checkpoints AS c JOIN newest_runs AS r USING (run_key)
    QUALIFY row_number() OVER (PARTITION BY c.checkpoint_key ORDER BY r.finished_at DESC, c.rowid) = 1
), options AS (
    SELECT once.place, option.key AS field, CAST(option.value AS VARCHAR) AS value,
        hash(option.key, CAST(option.value AS VARCHAR)) AS mark
    FROM once, json_each(once.config) AS option
), rest AS (
    -- two checkpoints that differ in nothing but a field have the same marks without that field's
    SELECT place, field, value, xor(bit_xor(mark) OVER (PARTITION BY place), mark) AS others FROM options
)
SELECT a.model, x.field, x.value, y.value AS other_value, a.spec, a.checkpoint, b.spec AS other_spec,
    b.checkpoint AS other_checkpoint, a.run_key, b.run_key AS other_run_key, a.checkpoint_key,
    b.checkpoint_key AS other_checkpoint_key
FROM rest AS x JOIN rest AS y ON x.field = y.field AND x.others = y.others AND x.value <> y.value AND x.place < y.place
JOIN once AS a ON a.place = x.place JOIN once AS b ON b.place = y.place
ORDER BY a.model, x.field, a.place, b.place;
