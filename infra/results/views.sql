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

-- What was measured of each checkpoint of these runs, a row each, and what decides whether two rows may be compared:
-- ..._alike is the same number where figures were taken under the same protocol.
CREATE OR REPLACE MACRO measured_of(run_keys) AS TABLE
WITH chosen AS (
    SELECT *, rowid AS place, concat(suite, '/', task, '/', metric) AS figure, metric LIKE 'ppl@%' AS is_ppl,
        metric = 'acc' AND num_fewshot = 0 AND task NOT LIKE 'mmlu%' AS is_task,
        metric = 'acc' AND task = 'average' AS is_average, suite = 'profile' AND task = 'profile' AS is_profile
    FROM metrics WHERE run_key IN (SELECT unnest(run_keys))
        AND (metric LIKE 'ppl@%' OR metric = 'acc' OR suite = 'profile')
), protocols AS (
    SELECT protocol, hash(deciding(protocol)) AS alike FROM (SELECT DISTINCT protocol FROM chosen)
)
SELECT run_key, checkpoint, checkpoint_key,
    map_from_entries(list({'key': figure, 'value': value} ORDER BY place) FILTER (is_ppl)) AS perplexities,
    arg_min(value, place) FILTER (is_ppl) AS ppl,
    arg_min(figure, place) FILTER (is_ppl) AS ppl_of,
    arg_min(alike, place) FILTER (is_ppl) AS ppl_alike,
    coalesce(max(value) FILTER (is_average), avg(value) FILTER (is_task AND NOT is_average)) AS zero_shot_avg,
    count(*) FILTER (is_task AND NOT is_average) AS zero_shot_tasks,
    hash(list(DISTINCT concat(task, ' ', alike) ORDER BY concat(task, ' ', alike)) FILTER (is_task)) AS zero_shot_alike,
    max(value) FILTER (is_profile AND metric = 'latency_ms_p50') AS latency_ms,
    max(value) FILTER (is_profile AND metric = 'prefill_ms_p50') AS prefill_ms,
    max(value) FILTER (is_profile AND metric = 'decode_ms_per_token_p50') AS decode_ms_per_token,
    max(value) FILTER (is_profile AND metric = 'tokens_per_s') AS tokens_per_s,
    max(value) FILTER (is_profile AND metric = 'latency_ratio') AS latency_ratio,
    max(value) FILTER (is_profile AND metric = 'peak_memory_gib') AS peak_memory_gib,
    arg_min(alike, place) FILTER (is_profile) AS profile_alike,
    max(value) FILTER (suite = 'profile' AND metric = 'num_parameters') AS num_parameters,
    max(value) FILTER (suite = 'profile' AND metric = 'num_decoder_parameters') AS num_decoder_parameters
FROM chosen JOIN protocols USING (protocol)
GROUP BY run_key, checkpoint, checkpoint_key;

-- The same of all runs, as a table: whoever takes a run in adds its rows.
CREATE OR REPLACE TABLE measured AS SELECT * FROM measured_of((SELECT list(run_key) FROM runs));

-- Parameters of each checkpoint: as recorded with it, else as a profile of it counted them.
CREATE OR REPLACE VIEW sizes AS
WITH profiled AS (
    SELECT checkpoint_key, max(num_parameters) AS num_parameters, max(num_decoder_parameters) AS num_decoder_parameters
    FROM measured GROUP BY checkpoint_key
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
SELECT r.name AS spec, c.checkpoint, c.model, c.method, c.recovery, c.variant,
    c.total_sparsity AS sparsity_asked,
    1 - s.num_decoder_parameters / d.num_decoder_parameters AS sparsity,
    s.num_parameters, s.num_decoder_parameters,
    m.ppl, m.ppl_of, m.perplexities, m.zero_shot_avg, coalesce(m.zero_shot_tasks, 0) AS zero_shot_tasks,
    m.latency_ms, m.prefill_ms, m.decode_ms_per_token, m.tokens_per_s, m.latency_ratio, m.peak_memory_gib,
    m.ppl_alike, m.zero_shot_alike, m.profile_alike, r.status, r.finished_at, c.run_key, c.checkpoint_key
FROM runs AS r
JOIN (SELECT unnest(run_keys) AS run_key) USING (run_key)
JOIN checkpoints AS c USING (run_key)
LEFT JOIN sizes AS s ON s.run_key = c.run_key AND s.checkpoint = c.checkpoint
LEFT JOIN sizes AS d ON d.run_key = c.run_key AND d.checkpoint = 'dense'
LEFT JOIN measured AS m ON m.run_key = c.run_key AND m.checkpoint = c.checkpoint
ORDER BY c.model, r.name, c.rowid;

-- The same of the newest run of each spec.
CREATE OR REPLACE VIEW leaderboard AS
SELECT * FROM leaderboard_of((SELECT list(run_key) FROM newest_runs));

-- The checkpoints that no other beats in both of two figures, each a name of `figures` or a pattern with * ? [..].
-- Only figures of the same name and protocol are set against each other; a checkpoint of several specs counts once.
CREATE OR REPLACE MACRO pareto(size_figure, quality_figure) AS TABLE
WITH matched AS (
    SELECT * FROM figures WHERE NOT isnan(value) AND (figure IN (size_figure, quality_figure)
        OR figure GLOB size_figure OR figure GLOB quality_figure)
), protocols AS (
    SELECT protocol, hash(deciding(protocol)) AS alike FROM (SELECT DISTINCT protocol FROM matched)
), once AS (
    SELECT m.*, p.alike FROM matched AS m JOIN protocols AS p USING (protocol)
    QUALIFY row_number() OVER (PARTITION BY checkpoint_key, figure, alike ORDER BY finished_at DESC) = 1
), points AS (
    SELECT s.figure AS size_name, s.value AS size, q.figure AS quality_name, q.value AS quality, q.stderr,
        q.spec, q.checkpoint, q.run_key, q.checkpoint_key, q.protocol,
        hash(s.alike, q.alike) AS alike,
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
