"""A statement as one HTML page: to read, to print, to send. It loads nothing from anywhere."""

from calendar import month_name
from decimal import Decimal
from html import escape

from farm import pricing
from farm.catalog import Method
from farm.statements import Bill, Line, Status, month_after

STYLE = """
:root { --ink: #1d1d1b; --grey: #6b6b66; --line: #dcdcd6; --paper: #ffffff; --desk: #f4f4f1; --note: #8a5a00; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--desk); color: var(--ink); font: 15px/1.5 "Helvetica Neue", Helvetica, Arial,
  "Liberation Sans", sans-serif; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
main { max-width: 210mm; min-height: 297mm; margin: 2rem auto; padding: 22mm 20mm; background: var(--paper);
  border: 1px solid var(--line); display: flex; flex-direction: column; }
header { display: flex; justify-content: space-between; align-items: flex-start; gap: 2rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.15; font-weight: 600; letter-spacing: -0.015em; }
h1 small { display: block; font-size: 1rem; font-weight: 400; letter-spacing: 0; color: var(--grey); }
dl { margin: 0; display: grid; grid-template-columns: auto auto; gap: 0.15rem 1.25rem; font-size: 0.875rem; }
dt { color: var(--grey); } dd { margin: 0; text-align: right; }
.due { margin: 14mm 0 12mm; padding: 6mm 0; border-top: 2px solid var(--ink); border-bottom: 1px solid var(--line);
  display: flex; justify-content: space-between; align-items: baseline; }
.due strong { font-size: 2rem; font-weight: 600; letter-spacing: -0.015em; }
table { width: 100%; border-collapse: collapse; font-size: 0.875rem; }
caption { text-align: left; color: var(--grey); padding-bottom: 0.5rem; }
th { font-weight: 500; color: var(--grey); text-align: left; border-bottom: 1px solid var(--ink); padding: 0 0 0.4rem; }
td { padding: 0.55rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tfoot td { border-bottom: 0; border-top: 1px solid var(--ink); font-weight: 600; padding-top: 0.7rem; }
.n { text-align: right; padding-left: 1.25rem; white-space: nowrap; }
.n, dd, .due strong { font-variant-numeric: tabular-nums lining-nums; }
.under { display: block; font-size: 0.78rem; color: var(--grey); font-weight: 400; }
.draft { color: var(--note); border: 1px solid currentColor; border-radius: 3px; padding: 0.05rem 0.5rem;
  font-size: 0.8rem; white-space: nowrap; }
footer { margin-top: auto; padding-top: 14mm; font-size: 0.78rem; color: var(--grey); }
footer p { margin: 0 0 0.35rem; max-width: 62ch; }
tr, .due { break-inside: avoid; } thead { display: table-header-group; }
@page { size: A4; margin: 18mm 16mm; }
@media print { body { background: none; } main { margin: 0; padding: 0; border: 0; max-width: none; min-height: 0; } }
@media (max-width: 640px) { main { padding: 1.25rem; margin: 0; } header { flex-direction: column; }
  .wide { display: none; } }
"""

UNITS = {"mpx_step": "megapixel-step", "image": "image", "reuse": "reused image"}


def html(bill: Bill) -> str:
    """The page of a statement, or of the draft of one."""
    month = f"{month_name[bill.month.month]} {bill.month.year}"
    title = f"{bill.account} · {month}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Statement {escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1><small>Statement</small>{escape(month)}</h1>
<dl>{_facts(bill)}</dl>
</header>
<div class="due"><span>{_due(bill)}</span><strong>{_money(bill.total, bill)}&nbsp;{escape(bill.currency)}</strong></div>
{_table(bill)}
<footer>{_notes(bill)}</footer>
</main>
</body>
</html>
"""


def _facts(bill: Bill) -> str:
    last = month_after(bill.month).toordinal() - 1
    facts = [
        ("Account", escape(bill.account)),
        ("Number", f"{escape(bill.account)}-{bill.month:%Y-%m}"),
        ("Period", f"{bill.month:%Y-%m-%d} to {type(bill.month).fromordinal(last):%Y-%m-%d}, UTC"),
        (
            ("Closed", f"{bill.closed_at:%Y-%m-%d}")
            if bill.closed_at
            else ("Status", '<span class="draft">Draft</span>')
        ),
    ]
    return "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)


def _due(bill: Bill) -> str:
    return "Total" if bill.status is Status.CLOSED else "Total so far"


def _table(bill: Bill) -> str:
    if not bill.lines:
        return "<p>Nothing was used.</p>"
    rows = "".join(_row(line, bill) for line in bill.lines)
    images = sum(line.frames - line.reversed for line in bill.lines)
    return f"""<table>
<thead><tr><th>Model</th><th class="n">Images</th><th class="n wide">Quantity</th><th class="n">Rate</th>
<th class="n">Amount, {escape(bill.currency)}</th></tr></thead>
<tbody>{rows}</tbody>
<tfoot><tr><td>Total</td><td class="n">{images:,}</td><td class="n wide"></td><td></td>
<td class="n">{_money(bill.total, bill)}</td></tr></tfoot>
</table>"""


def _row(line: Line, bill: Bill) -> str:
    unit = escape(UNITS.get(line.method, line.method))
    return (
        f"<tr><td>{escape(line.model)}{_under(_remarks(line))}</td>"
        f'<td class="n">{line.frames - line.reversed:,}</td>'
        f'<td class="n wide">{_quantity(line)}</td>'
        f'<td class="n">{pricing.shown(line.rate)}{_under(f"per {unit}")}</td>'
        f'<td class="n">{_money(line.amount, bill)}{_under(_exactly(line))}</td></tr>'
    )


def _under(text: str) -> str:
    return f'<span class="under">{text}</span>' if text else ""


def _remarks(line: Line) -> str:
    """What a reader would ask about."""
    parts = []
    if line.reversed:
        parts.append(f"{line.frames:,} delivered, {line.reversed:,} taken back")
    if line.late:
        parts.append(f"{line.late:,} from before this month")
    return "; ".join(parts)


def _quantity(line: Line) -> str:
    if line.method != Method.MPX_STEP:
        return f"{line.quantity:,}{_under(UNITS.get(line.method, line.method) + 's')}"
    steps = Decimal(line.quantity) * pricing.FACTOR[Method.MPX_STEP]
    exact = f"{line.quantity:,} pixel-steps"
    return f"{steps:,.3f}{_under('megapixel-steps')}{_under(exact)}"


def _exactly(line: Line) -> str:
    if line.exact == line.amount:
        return ""
    return f"{line.exact:,f}".rstrip("0").replace("-", "−") + " before rounding"


def _money(amount: Decimal, bill: Bill) -> str:
    return f"{amount:,.{bill.digits}f}".replace("-", "−")


def _notes(bill: Bill) -> str:
    notes = [
        "Only delivered images are charged. A pixel-step is one denoising step of one pixel; a megapixel-step is "
        "1024 × 1024 of them, and is shown rounded.",
        "Each line is its images, or its pixel-steps, at its rate, exactly, and rounded once; lines add up to the "
        "total, which is the exact sum rounded.",
    ]
    if bill.status is not Status.CLOSED:
        notes.insert(0, "This is a draft: the month is not closed, and amounts may still change.")
    return "".join(f"<p>{note}</p>" for note in notes)
