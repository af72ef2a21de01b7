"""A bundle's model card, made from the files that the bundle holds, so that no number in it is typed by hand.

Sections after Mitchell et al. 2019, "Model Cards for Model Reporting". What only the authors of a bundle can say (data,
reporting checklists) they write themselves, into files that go into the bundle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from lungscope.bundle import Bundle
from lungscope.evaluation.calibration import HEALTHY
from lungscope.precision import LEAST_SAME_CLASS, LEAST_SAME_MASK, LEAST_SPEED, MOST_LOST, MOST_SEVERITY_MAE
from lungscope.report import DISCLAIMER
from lungscope.stages.classification import INPUT_NAMES, ViewSpec, view_name
from lungscope.statistics import number, with_interval

METRICS = "metrics.json"
CONTROLS = "controls.json"
DATA_CARD = "DATA_CARD.md"
REPORTING = "REPORTING.md"

#: What a source is called that can not be told.
NOT_KNOWN = "not known"


def model_card(bundle: Bundle) -> str:
    """The card of `bundle` as Markdown, from its manifest and, where it has them, its metrics and controls."""
    metrics = _read(bundle, METRICS)
    parts = [
        f"# Model card: {bundle.name} {bundle.version}",
        f"**{DISCLAIMER}**",
        _use(bundle),
        _data(bundle),
        _training(bundle),
        *_results(metrics),
        *_precision(bundle),
        *_controls(bundle),
        *_failures(bundle, metrics),
    ]
    if REPORTING in bundle.files:
        parts.append((bundle.root / REPORTING).read_text(encoding="utf-8").strip())
    return "\n\n".join(parts) + "\n"


def _read(bundle: Bundle, name: str) -> dict[str, Any]:
    if name not in bundle.files:
        return {}
    document: dict[str, Any] = json.loads((bundle.root / name).read_text(encoding="utf-8"))
    return document


def _use(bundle: Bundle) -> str:
    networks = ", ".join(weights.network for weights in bundle.segmenter.members)
    text = (
        f"## Intended use\nFrontal chest films. The segmenter ({networks}, {bundle.segmenter.size}²) finds both lungs. "
    )
    if bundle.classifier is not None:
        spec = bundle.classifier
        text += (
            f"The classifier ({spec.weights.network}, {spec.view.size}², {view_name(spec.view)}) gives "
            f"probabilities of {', '.join(spec.labels)}"
            + (
                "; neither they nor sets were calibrated"
                if spec.conformal is None
                else ", calibrated, and a conformal set"
            )
            + (
                f"; where the two largest logits are closer than {spec.mirror:g}, the mean of its answers to the view "
                "and to its mirror image counts"
                if spec.mirror
                else ""
            )
            + "; a heat map shows what spoke for the class, and severity is derived from "
            + _severity(bundle)
        )
    return text + (
        "For research and teaching: to train, compare and study networks.\n\n"
        "**Not for** diagnosis, triage or any decision about a patient, nor for lateral films."
    )


def _severity(bundle: Bundle) -> str:
    """What severity is derived from, and what that was fitted on."""
    involved = _involved(bundle) if bundle.segmenter.opaque is not None else "it. "
    if bundle.segmenter.grades is None:
        return involved
    limits = ", ".join(f"{limit:g}" for limit in bundle.segmenter.grades)
    runs = bundle.manifest.get("training", {}).get("runs", [])
    fitted = ""
    if fit := next((run["severity"] for run in runs if "severity" in run), None):
        films, patients, healthy = len(fit["films"]), fit["patients"], fit["healthy"]["train"]
        fitted = f" of {films} films of {patients} patients and to {healthy} healthy ones"
    return (
        "the segmenter's grades of zones: a weighted sum of what its encoder sees, fitted to two radiologists' Brixia "
        f"scores{fitted}; a zone scores 1, 2 and 3 from a grade of {limits} on. How much of a lung is involved is "
        f"derived from {involved}"
    )


def _involved(bundle: Bundle) -> str:
    """Above which opacity a place is involved, and what that was fitted on."""
    text = f"how opaque the lungs are: a place is involved above {bundle.segmenter.opaque:g}, "
    healthy = bundle.manifest.get("training", {}).get("healthy")
    if healthy is None:
        return text + "which was not fitted when this bundle was made. "
    clear = "score 0" if bundle.segmenter.grades is None else "are clear"
    return text + f"so that {HEALTHY:.0%} of the zones of {healthy['films']} healthy validation films {clear}. "


def _data(bundle: Bundle) -> str:
    if DATA_CARD not in bundle.files:
        return "## Data\nNot stated: this bundle has no data card."
    lines = (bundle.root / DATA_CARD).read_text(encoding="utf-8").strip().splitlines()
    # Its title gives way to the card's own.
    text = "\n".join(line for line in lines if not line.startswith("# ")).strip()
    return f"## Data\nLicence of the weights: {bundle.manifest['licence']}.\n\n{text}"


def _training(bundle: Bundle) -> str:
    rows = []
    for run in bundle.manifest.get("training", {}).get("runs", []):
        # Weights that no run of this package made say less of themselves.
        phases = "; ".join(
            f"{p['epochs']} × {p['films'] or 'all'} films at {p['size']}²"
            for p in run.get("recipe", {}).get("phases", [])
        )
        if mean_of := run.get("mean_of"):
            phases = f"the mean of the weights of {len(mean_of)} runs; the last one: {phases}"
        films = " / ".join(str(run.get("films", {}).get(part, "not stated")) for part in ("train", "val"))
        best = ", ".join(f"{k} {v:.4f}" for k, v in run.get("metrics", {}).items() if k.startswith("val_"))
        facts = (phases, run.get("precision"), best)
        digest = f"`{run['weights_sha256'][:16]}…`"
        rows.append((run["network"], films, *(fact or "not stated" for fact in facts), digest))
    table = _table(
        ("network", "films train / val", "epochs of the last run", "precision", "validation", "SHA-256"),
        rows,
    )
    return (
        "## Training\n"
        f"{table}\n\nThe whole recipes (optimizer, schedule, augmentation, seed) are in `manifest.json`. A run that "
        "started from another's weights lists only its own epochs; the recipe's file says the rest."
    )


def _results(metrics: dict[str, Any]) -> list[str]:
    if not metrics:
        return ["## Results\nNot measured: this bundle was exported without metrics."]
    rows = []
    for row in metrics.get("segmenter", []):
        dice, hd95 = row["scores"]["dice"], row["scores"]["hd95"]
        rows.append(
            (f"lungs, {row['store']} {row['part']}: strict Dice", row["films"],
             with_interval(dice["mean"], dice["interval"]),
             f"5th percentile {number(dice['p5'], 3)}; HD95 {number(hd95['mean'], 1)} px of the mask's grid; "
             f"films that failed: {row['failed']}")
        )  # fmt: skip
    if "lesions" in metrics:
        scores = metrics["lesions"]["scores"]
        for name, what in (("coverage", "drawn disease inside our lungs"), ("precision", "our lungs inside the drawn")):
            score = scores[name]
            rows.append(
                (what, score["defined"], with_interval(score["mean"], score["interval"]),
                 f"10th percentile {number(score['p10'], 3)}")
            )  # fmt: skip
        for name, what in (("saliency", "evidence for the class"), ("opacity", "opacity")):
            if (score := scores.get(f"{name}_on_disease")) is not None:
                beside = f"disease is {number(scores['disease_share']['mean'], 3)} of the lungs: what chance would give"
                if (more := scores.get(f"{name}_above_chance")) is not None:
                    beside += f"; film by film {with_interval(more['mean'], more['interval'], 3)} above that"
                rows.append(
                    (f"{what} that lies on drawn disease", score["defined"],
                     with_interval(score["mean"], score["interval"]), beside)
                )  # fmt: skip
    for row in metrics.get("classifier", []):
        spans = row["intervals"]
        what = f"class from {_sees(row)}, {row['store']} {row['part']}"
        rows += [
            (f"{what}: accuracy", row["films"], with_interval(row["accuracy"], spans["accuracy"]),
             f"films that failed: {len(row['failed'])}"),
            (f"{what}: macro-F1", row["films"], with_interval(row["macro_f1"], spans["macro_f1"]),
             f"macro AUC {with_interval(row['macro_auc'], spans['macro_auc'])}"),
            (f"{what}: ECE, 15 bins", row["films"], with_interval(row["ece"], spans["ece"]),
             f"temperature {number(row['temperature'], 2)}; log-loss {number(row['log_loss'], 3)}{_by_chance(row)}"),
        ]  # fmt: skip
    severity = metrics.get("severity", {})
    if severity.get("global"):
        for what, films, new_films in (
            ("global", "global severity beside the senior radiologist's Brixia score: Spearman",
             "the same, films known to be of patients of whom none was fitted on"),
            ("zones", "severity of a zone, six a film, beside the senior radiologist's: Spearman",
             "the same, zones of those patients"),
        ):  # fmt: skip
            for name, found in ((films, severity), (new_films, severity.get("new_patients"))):
                if found is not None:
                    ours = found[what]["ours_senior"]
                    value = with_interval(ours["spearman"], ours["interval"], 2)
                    rows.append((name, _defined(found, what), value, _severity_beside(found[what])))
    table = _table(("what", "n", "value [95 % interval]", "beside it"), rows)
    hardware = metrics["hardware"]
    note = (
        f"Measured at commit {metrics['commit'] or 'unknown'} on {hardware['cores']} cores of {hardware['processor']}, "
        f"{hardware['precision']}, through the path that ships. Parts: {', '.join(metrics['split'])}. Intervals are "
        "bootstrapped over duplicate groups or patients. Training and test films of a set are alike; what its scores "
        "are worth on films from elsewhere they do not say."
    )
    if severity:
        seen = severity["seen"]
        note += (
            " Severity: near-duplicates of films that were trained on were not looked for."
            if not severity.get("checked", seen is not None)
            else f" Severity: {len(seen)} near-duplicates of films of these sets are left out."
            if not severity.get("fitted")
            else f" Severity: {len(seen)} films that are near-duplicates of films of these sets, or that grades were "
            "fitted on, are left out."
        )
        if severity.get("failed"):
            note += f" {len(severity['failed'])} of its {severity['films']} films could not be analysed."
    classified = metrics.get("classifier", [])
    return [f"## Results\n{table}\n\n{note}", *map(_by_class, classified), *_by_source(classified)]


def _by_chance(row: dict[str, Any]) -> str:
    """What ECE would be for chance alone; bundles of before do not say."""
    found = row.get("ece_by_chance")
    if found is None:
        return ""
    return f"; by chance alone ECE would be {number(found['median'])}, in one of twenty above {number(found['p95'])}"


def _defined(severity: dict[str, Any], what: str) -> int:
    """How many films or zones have a score of ours; bundles of before say of how many films they were asked."""
    return int(severity[what]["ours_senior"].get("defined", severity["scored"]))


def _severity_beside(score: dict[str, Any]) -> str:
    junior, between = (number(score[pair]["spearman"], 2) for pair in ("ours_junior", "senior_junior"))
    return f"beside the junior {junior}; between the radiologists {between}"


def _by_class(row: dict[str, Any]) -> str:
    sets = row["conformal"]
    rows = []
    for (label, facts), counts in zip(row["classes"].items(), row["confusion"], strict=True):
        spans = row["class_intervals"][label]
        scores = [with_interval(facts[name], spans[name], 3) for name in ("sensitivity", "specificity", "f1")]
        covered = sets["classes"][label] if sets else None
        coverage = with_interval(covered["coverage"], covered["interval"], 3) if covered else "none fitted"
        rows.append((label, facts["films"], *scores, number(facts["auc"]), coverage, *counts))
    names = (f"called {label}" for label in row["labels"])
    table = _table(("class", "n", "sensitivity", "specificity", "F1", "AUC", "conformal coverage", *names), rows)
    text = f"### By class: {row['store']} {row['part']}\n{table}"
    if sets:
        sizes = ", ".join(f"{count} hold {size}" for size, count in sets["sizes"].items() if count)
        text += (
            f"\n\nConformal sets, nominal {sets['nominal']:.0%}: coverage "
            f"{with_interval(sets['coverage'], sets['interval'])}; {sizes} classes. Answered (the set is the most "
            f"probable class alone): {sets['answered']:.1%} of films, right on {number(sets['accuracy_answered'])}."
        )
    return text


def _sees(row: dict[str, Any]) -> str:
    """What the network of a row of scores is shown; results of before name the input alone."""
    return view_name(ViewSpec(**row["view"])) if "view" in row else INPUT_NAMES[row["input"]]


def counted(classes: dict[str, int]) -> str:
    """How many films there are of each class, as text."""
    return ", ".join(f"{label} {films}" for label, films in classes.items())


def _by_source(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Accuracy within each source; nothing where no source was known."""
    lines = [
        (_sees(row), f"{row['store']}: {source or NOT_KNOWN}", facts["films"], facts["failed"],
         counted(facts["classes"]), with_interval(facts["accuracy"], facts["interval"]))
        for row in rows for source, facts in row.get("sources", {}).items()
    ]  # fmt: skip
    if not lines:
        return []
    table = _table(("network sees", "store: source", "n", "failed", "classes", "accuracy [95 % interval]"), lines)
    return [
        f"### By source\n{table}\n\nA source of one class says how often that is recognised. Within a source of "
        "several classes, what differs between sources (apparatus, processing, age) can not tell the class."
    ]


def recorded_controls(bundle: Bundle) -> list[dict[str, Any]]:
    """The scores of control networks that a bundle carries, one row for each network and store; none in many."""
    controls = _read(bundle, CONTROLS)
    return [row for run in (controls, *controls.get("controls", [])) for row in run.get("stores", [])]


def _controls(bundle: Bundle) -> list[str]:
    rows = [
        (_sees(row), row["films"], with_interval(row["accuracy"], row["intervals"]["accuracy"]),
         with_interval(row["macro_f1"], row["intervals"]["macro_f1"]), number(row["macro_auc"]))
        for row in recorded_controls(bundle)
    ]  # fmt: skip
    if not rows:
        return []
    table = _table(("network sees", "n", "accuracy [95 % interval]", "macro-F1 [95 % interval]", "macro AUC"), rows)
    return [
        "## Controls\n"
        "One network, trained on different inputs by one recipe, which need not be that of the weights above, and not "
        "always from the same beginning. What the background alone tells is not about lungs, and where classes come "
        f"from different places the lungs' accuracy may hold some of it too.\n\n{table}",
        *_by_source(recorded_controls(bundle)),
    ]


def _precision(bundle: Bundle) -> list[str]:
    """What each precision but f32 changes, and whether `auto` may take it; nothing where none was measured."""
    rows, notes = [], []
    for name, gate in bundle.offered.gates.items():
        accuracy, same = gate.accuracy, gate.same_class
        rows.append(
            (name, "passed" if gate.passed else f"failed: {'; '.join(gate.failures)}",
             f"{number(gate.dice.f32)} → {number(gate.dice.value)} (n = {gate.dice.films})",
             "no classifier" if accuracy is None
             else f"{number(accuracy.f32)} → {number(accuracy.value)} (n = {accuracy.films})",
             "no classifier" if same is None else f"{same:.2%}", number(gate.same_mask),
             "not measured" if gate.severity_mae is None else number(gate.severity_mae, 3), gate.films,
             f"{gate.again:.1%}, closer than {number(gate.margin, 2)}" if gate.margin else "none",
             number(gate.speed, 2))
        )  # fmt: skip
        measured = bundle.manifest["precision"]["gates"][name]["measured"]
        hardware = measured["hardware"]
        notes.append(
            f"{name}: {measured['part']} of {', '.join(measured['stores'])}, on {hardware['cores']} cores of "
            f"{hardware['processor']} ({' '.join(hardware['features'])}), OpenVINO "
            f"{measured['versions']['openvino'].partition('-')[0]}, commit {measured['commit'] or 'unknown'}."
        )
    if not rows:
        return []
    head = (
        "precision",
        "gate",
        "Dice, f32 →",
        "accuracy, f32 →",
        "same class",
        "Dice of masks with f32's",
        "zones' scores differ by",
        "n",
        "again in f32",
        "speed",
    )
    return [
        "## Precision\n"
        f"`auto` computes in f32, or in what a processor computes natively, whose gate was passed here and which made "
        f"the networks at least {LEAST_SPEED:g} times as fast. A gate is passed where Dice and accuracy fall by no "
        f"more than {MOST_LOST}, at least {LEAST_SAME_CLASS:.1%} of films keep their class, and masks have a Dice of "
        f"at least {LEAST_SAME_MASK} with those of f32; where it was measured, zones' severity scores differ by "
        f"{MOST_SEVERITY_MAE} on average or less. Films whose two largest logits are closer than a margin, found on "
        f"training films, are computed again in f32. Speed is that of the networks, as a multiple of f32's."
        f"\n\n{_table(head, rows)}\n\n{' '.join(notes)}".rstrip()
    ]


def _failures(bundle: Bundle, metrics: dict[str, Any]) -> list[str]:
    items = []
    for row in metrics.get("segmenter", []):
        worst = ", ".join(f"{film['id']} {number(film['dice'], 3)}" for film in row["worst"][:5])
        items.append(f"Lungs, {row['store']}: the films with the least Dice are {worst}.")
    for row in metrics.get("classifier", []):
        wrong = [
            (count, true, row["labels"][c])
            for true, counts in zip(row["labels"], row["confusion"], strict=True)
            for c, count in enumerate(counts)
            if row["labels"][c] != true and count
        ]
        for count, true, called in sorted(wrong, reverse=True)[:3]:
            films = row["classes"][true]["films"]
            items.append(f"{count} of {films} {true} films are called {called} ({count / films:.1%}).")
    if bundle.classifier is not None:
        items += [
            "A film of a disease that is no class here gets a class all the same, or no answer.",
            "Severity is derived from few films that radiologists scored, nearly all of adults with pneumonia: what it "
            "is worth on other disease is not known. Whatever looks like theirs counts, disease or not, and the score "
            "may contradict the class, and how much of a lung is involved."
            if bundle.segmenter.grades is not None
            else "Severity is derived from a map of opacity that was learnt from painted opacities: anything that "
            "hides air counts, disease or not, and the score may contradict the class."
            if bundle.segmenter.opaque is not None
            else "Severity is derived from the classifier's evidence, so that it fails where the classifier does, and "
            "may contradict the class.",
        ]
    items.append("A lateral film that does not say so in its header is taken for a frontal one.")
    return ["## How it fails\n" + "\n".join(f"- {item}" for item in items)]


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
