//! What was found: a table for the terminal, JSON for programs, an SVG chart for the README.

use std::path::Path;

use anyhow::Context as _;
use serde_json::json;

use crate::stats::Rounds;

/// What a value should be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

/// One line of the table.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    pub(crate) what: String,
    /// `x` (a ratio), `ms`, `MB`.
    pub(crate) unit: &'static str,
    pub(crate) goal: Goal,
    pub(crate) reached: Rounds,
}

impl Line {
    pub(crate) fn new(what: impl Into<String>, goal: Goal, unit: &'static str, reached: Rounds) -> Line {
        Line { what: what.into(), unit, goal, reached }
    }

    fn is_met(&self) -> bool {
        self.share() >= 1.0
    }

    /// How far the median is: 1 is the goal, more is better.
    fn share(&self) -> f64 {
        match self.goal {
            Goal::AtLeast(goal) => self.reached.median() / goal,
            Goal::AtMost(goal) => goal / self.reached.median(),
        }
    }

    fn goal(&self) -> String {
        match self.goal {
            Goal::AtLeast(goal) => format!(">= {goal} {}", self.unit),
            Goal::AtMost(goal) => format!("<= {goal} {}", self.unit),
        }
    }

    fn reached(&self) -> String {
        let Line { unit, reached, .. } = self;
        match reached.count() {
            1 => format!("{} {unit}", short(reached.median())),
            _ => {
                format!("{} {unit} ({} .. {})", short(reached.median()), short(reached.min()), short(reached.max()))
            }
        }
    }
}

/// What one scenario or all of them found.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) lines: Vec<Line>,
    /// The absolute numbers behind the lines, and what a reader must know of them. Sentences.
    pub(crate) notes: Vec<String>,
}

impl Report {
    /// Adds the absolute numbers of one contender.
    pub(crate) fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        eprintln!("  {note}");
        self.notes.push(note);
    }

    pub(crate) fn line(&mut self, line: Line) {
        eprintln!("  {}: {} (goal {})", line.what, line.reached(), line.goal());
        self.lines.push(line);
    }

    pub(crate) fn extend(&mut self, other: Report) {
        self.lines.extend(other.lines);
        self.notes.extend(other.notes);
    }

    /// The table, in Markdown.
    pub(crate) fn table(&self) -> String {
        let met = |line: &Line| if line.is_met() { "yes" } else { "no" };
        let row = |line: &Line| format!("| {} | {} | {} | {} |\n", line.what, line.goal(), line.reached(), met(line));
        let rows: String = self.lines.iter().map(row).collect();
        format!("| what | goal | reached: median (lowest .. highest) | met? |\n|---|---|---|---|\n{rows}")
    }

    /// Writes `name.json` and `name.svg` into a folder.
    ///
    /// # Errors
    /// Where they cannot be written.
    pub(crate) fn write(&self, folder: &Path, name: &str, machine: &serde_json::Value) -> anyhow::Result<()> {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        let save = |extension: &str, text: String| {
            let path = folder.join(format!("{name}.{extension}"));
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
            eprintln!("wrote {}", path.display());
            anyhow::Ok(())
        };
        save("json", format!("{:#}\n", self.to_json(machine)))?;
        save("svg", self.chart())
    }

    fn to_json(&self, machine: &serde_json::Value) -> serde_json::Value {
        let line = |line: &Line| {
            let (goal, kind) = match line.goal {
                Goal::AtLeast(goal) => (goal, "at least"),
                Goal::AtMost(goal) => (goal, "at most"),
            };
            json!({
                "what": line.what, "unit": line.unit, "goal": goal, "goal_is": kind, "met": line.is_met(),
                "median": line.reached.median(), "min": line.reached.min(), "max": line.reached.max(),
                "rounds": line.reached.count(),
            })
        };
        let lines: Vec<_> = self.lines.iter().map(line).collect();
        json!({ "machine": machine, "lines": lines, "notes": self.notes })
    }

    /// A bar a line: how far the median is on the way to its goal.
    fn chart(&self) -> String {
        const ROW: usize = 26;
        const LABELS: usize = 560;
        const WIDTH: usize = 1000;
        /// Bars end here: one that is ten times its goal must not make the others invisible.
        const MOST: f64 = 2.0;
        let x = |share: f64| LABELS as f64 + share.min(MOST) / MOST * 240.0;
        let height = ROW * (self.lines.len() + 2);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
             font-size=\"13\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n"
        );
        for (place, line) in self.lines.iter().enumerate() {
            let top = ROW * (place + 1);
            let text = top + 14;
            let colour = if line.is_met() { "#2f7d4f" } else { "#b5651d" };
            let end = x(line.share());
            svg += &format!(
                "<text x=\"{}\" y=\"{text}\" text-anchor=\"end\">{}</text>\n<rect x=\"{LABELS}\" y=\"{top}\" \
                 width=\"{:.0}\" height=\"18\" fill=\"{colour}\"/>\n<text x=\"{:.0}\" y=\"{text}\">{} {} (goal {})</text>\n",
                LABELS - 8,
                escaped(&line.what),
                end - LABELS as f64,
                end.max(x(1.0)) + 6.0,
                short(line.reached.median()),
                line.unit,
                escaped(&line.goal()),
            );
        }
        let goal = x(1.0);
        svg += &format!(
            "<line x1=\"{goal:.0}\" y1=\"{ROW}\" x2=\"{goal:.0}\" y2=\"{}\" stroke=\"#333\" stroke-dasharray=\"4 3\"/>\n\
             <text x=\"{goal:.0}\" y=\"16\" text-anchor=\"middle\">goal</text>\n</svg>\n",
            height - ROW
        );
        svg
    }
}

/// Three digits that say something.
pub(crate) fn short(value: f64) -> String {
    match value.abs() {
        0.0..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_met_or_not_whichever_way_it_points() {
        let met = |goal, value| Line::new("it", goal, "x", Rounds::of([value])).is_met();
        assert!(met(Goal::AtLeast(0.9), 0.91) && !met(Goal::AtLeast(0.9), 0.89));
        assert!(met(Goal::AtMost(1.2), 1.19) && !met(Goal::AtMost(1.2), 1.21));
    }

    #[test]
    fn the_table_has_goal_and_spread_side_by_side() {
        let line = Line::new("a < b", Goal::AtLeast(0.65), "x", Rounds::of([0.7, 0.6, 0.66]));
        let report = Report { lines: vec![line], notes: vec![] };
        assert!(report.table().contains("| a < b | >= 0.65 x | 0.66 x (0.60 .. 0.70) | yes |"), "{}", report.table());
        let chart = report.chart();
        assert!(chart.contains("a &lt; b") && chart.contains("0.66 x (goal &gt;= 0.65 x)"), "{chart}");
    }
}
