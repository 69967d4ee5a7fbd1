# %% [markdown]
# # A sweep from a notebook
#
# The cells of this file open in Jupyter (with Jupytext), VS Code and PyCharm; `python docs/notebook.py` runs them all.
# Two teacher temperatures with two seeds each on the embedded digits take about a minute on two CPU cores.

# %%
from orchestrator.api import Sweep, compare, curves, expand, load_recipe, override, run_sweep, write_report

# %% [markdown]
# A recipe is a complete configuration. Keys are those of the command line.

# %%
recipe = override(load_recipe("quickstart"), {"pretrain.steps": 60, "pretrain.eval.every_steps": 20})

sweep = Sweep(
    name="notebook",
    base=recipe,
    space={"pretrain.teacher.temp": [0.04, 0.07]},
    seeds=2,
)
print([trial.trial_id for trial in expand(sweep)])

# %% [markdown]
# This blocks until all trials have ended. The record is in `./runs` and in MLflow, as after the command.

# %%
result = run_sweep(sweep)
assert result.ok, result.failed

# %% [markdown]
# Frames: a row per configuration, with the paired difference from the reference and its verdict; a row per trial; a
# row per logged point. With two seeds of sixty steps the verdict should be "not resolved".

# %%
comparison = compare(result)
configurations = comparison.configurations_frame()
print(configurations[["configuration", "mean", "sd", "num_seeds", "verdict", "seeds_needed"]])

# %%
trials = comparison.frame()
print(trials[["trial", comparison.metric, "random_weights", "health", "run_id"]])

# %%
points = curves(comparison, ["train/loss", comparison.metric])
print(points.pivot_table(index="step", columns=["metric", "trial"], values="value").tail(3))

# %% [markdown]
# The same report as the command's, and the same comparison from MLflow alone, which needs no run folder.

# %%
page = write_report(result.folder / "notebook.html", comparison, title="notebook")
from_mlflow = compare(result.folder.name, storage="nowhere")
assert sorted(from_mlflow.frame()[comparison.metric]) == sorted(trials[comparison.metric])
print(page)
