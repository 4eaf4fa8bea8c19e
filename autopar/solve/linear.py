"""A small integer program, built in bulk, solved by HiGHS through OR-tools' MathOpt."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

from autopar.errors import PlanError

FRACTION = 1e-6  # distance from an integer that still counts as one


@dataclass
class Linear:
    """minimize Σ cost[j]·x[j] subject to lower[i] ≤ Σ_j a[i, j]·x[j] ≤ upper[i], 0 ≤ x ≤ 1."""

    cost: list[float] = field(default_factory=list)
    integer: list[bool] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    entries: list[float] = field(default_factory=list)

    def variable(self, cost: float, integer: bool = False) -> int:
        self.cost.append(cost)
        self.integer.append(integer)
        return len(self.cost) - 1

    def constraint(self, terms: list[tuple[int, float]], lower: float, upper: float) -> None:
        row = len(self.lower)
        self.lower.append(lower)
        self.upper.append(upper)
        merged: dict[int, float] = {}
        for column, entry in terms:
            merged[column] = merged.get(column, 0.0) + entry
        for column, entry in sorted(merged.items()):
            self.rows.append(row)
            self.columns.append(column)
            self.entries.append(entry)


@dataclass(frozen=True)
class Solution:
    """Values (of the integer variables; 0 for others), objective, proved lower bound, whether the relaxation was integral."""

    values: list[float]
    objective: float
    bound: float
    relaxed: bool


def minimize(problem: Linear, seconds: float) -> Solution:
    """The relaxation first; branch only where it is fractional, for at most ``seconds``.

    Raises `PlanError` when there is no solution, or none was found in time.
    """
    first = run(problem, seconds, relax=True)
    if all(min(v, 1 - v) <= FRACTION for v, i in zip(first.values, problem.integer, strict=True) if i):
        return first
    return run(problem, seconds, relax=False)


def run(problem: Linear, seconds: float, *, relax: bool) -> Solution:
    from ortools.math_opt.python import mathopt

    scale = max(problem.cost, default=1.0) or 1.0
    model = mathopt.Model.from_model_proto(proto(problem, scale, relax))
    parameters = mathopt.SolveParameters(time_limit=timedelta(seconds=max(seconds, 0.1)))
    wanted = [v for v, i in zip(model.variables(), problem.integer, strict=True) if i]
    only = mathopt.ModelSolveParameters(
        variable_values_filter=mathopt.VariableFilter(filtered_items=wanted),
        dual_values_filter=mathopt.LinearConstraintFilter(filtered_items=[]),
        reduced_costs_filter=mathopt.VariableFilter(filtered_items=[]),
    )
    done = mathopt.solve(model, mathopt.SolverType.HIGHS, params=parameters, model_params=only)
    if not done.has_primal_feasible_solution():
        reason = done.termination.reason.name.lower()
        raise PlanError(f"no assignment of strategies was found: the solver says {reason} after {seconds:.0f} s")
    values = [0.0] * len(problem.cost)
    for v, x in done.variable_values().items():
        values[v.id] = x
    return Solution(values, done.objective_value() * scale, done.best_objective_bound() * scale, relax)


def proto(problem: Linear, scale: float, relax: bool):  # noqa: ANN201 - a protocol buffer
    from ortools.math_opt import model_pb2

    made = model_pb2.ModelProto()
    n, m = len(problem.cost), len(problem.lower)
    made.variables.ids.extend(range(n))
    made.variables.lower_bounds.extend([0.0] * n)
    made.variables.upper_bounds.extend([1.0] * n)
    made.variables.integers.extend([False] * n if relax else problem.integer)
    made.variables.names.extend([""] * n)
    costs = [(j, c / scale) for j, c in enumerate(problem.cost) if c]
    made.objective.linear_coefficients.ids.extend(j for j, _ in costs)
    made.objective.linear_coefficients.values.extend(c for _, c in costs)
    made.linear_constraints.ids.extend(range(m))
    made.linear_constraints.lower_bounds.extend(problem.lower)
    made.linear_constraints.upper_bounds.extend(problem.upper)
    made.linear_constraints.names.extend([""] * m)
    made.linear_constraint_matrix.row_ids.extend(problem.rows)
    made.linear_constraint_matrix.column_ids.extend(problem.columns)
    made.linear_constraint_matrix.coefficients.extend(problem.entries)
    return made
