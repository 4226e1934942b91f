//! Plots as SVG: one per case, with a panel for each of its chief measures; every sample is a dot, the median a bar. Where a
//! case has sizes, its medians are joined by lines, from size to size.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::stats::summary;

/// What one panel shows: its title with the unit, and per engine the samples.
pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) rows: Vec<(String, Vec<f64>)>,
    /// Where a mark lies, as a value.
    pub(crate) mark: Option<f64>,
}

/// How one measure grows: the sizes, of what they are, and per engine the medians.
pub(crate) struct Growth {
    pub(crate) title: String,
    pub(crate) of: &'static str,
    pub(crate) sizes: Vec<usize>,
    pub(crate) rows: Vec<(String, Vec<Option<f64>>)>,
}

const COLOURS: [RGBColor; 5] = [
    RGBColor(0x1f, 0x77, 0xb4),
    RGBColor(0xff, 0x7f, 0x0e),
    RGBColor(0x2c, 0xa0, 0x2c),
    RGBColor(0x94, 0x67, 0xbd),
    RGBColor(0x8c, 0x56, 0x4b),
];

/// Draws the panels side by side.
pub(crate) fn draw(path: &Path, panels: &[Panel]) -> Result<()> {
    let area = SVGBackend::new(path, (340 * panels.len() as u32, 300)).into_drawing_area();
    area.fill(&WHITE).map_err(|error| anyhow!("{}: {error}", path.display()))?;
    for (area, panel) in area.split_evenly((1, panels.len())).iter().zip(panels) {
        draw_panel(area, panel).map_err(|error| anyhow!("{}: {error}", path.display()))?;
    }
    area.present().map_err(|error| anyhow!("{}: {error}", path.display()))
}

fn draw_panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    panel: &Panel,
) -> Result<(), Box<dyn std::error::Error>> {
    let values = panel.rows.iter().flat_map(|(_, samples)| samples.iter().copied()).chain(panel.mark);
    let top = values.fold(0.0, f64::max).max(f64::MIN_POSITIVE) * 1.15;
    let count = panel.rows.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, ("sans-serif", 15))
        .margin(8)
        .x_label_area_size(24)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..count, 0.0..top)?;
    let names: Vec<&str> = panel.rows.iter().map(|(name, _)| name.as_str()).collect();
    let name = |x: &f64| {
        // Labels stand in the middle of a column.
        let in_the_middle = (x.fract() - 0.5).abs() < 0.01;
        names.get(*x as usize).filter(|_| in_the_middle).map_or_else(String::new, |name| (*name).to_owned())
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_labels(2 * panel.rows.len() + 1)
        .x_label_formatter(&name)
        .y_label_formatter(&|y| number(*y))
        .draw()?;
    for (column, (_, samples)) in panel.rows.iter().enumerate() {
        let Some(summary) = summary(samples) else { continue };
        let (column, colour) = (column as f64, COLOURS[column % COLOURS.len()]);
        let bar =
            Rectangle::new([(column + 0.2, 0.0), (column + 0.8, summary.median)], colour.mix(0.45).filled());
        chart.draw_series([bar])?;
        let steps = samples.len().max(2) as f64 - 1.0;
        chart.draw_series(samples.iter().enumerate().map(|(number, value)| {
            let x = column + 0.3 + 0.4 * (number as f64 / steps);
            Circle::new((x, *value), 2, colour.filled())
        }))?;
    }
    if let Some(mark) = panel.mark {
        chart.draw_series(LineSeries::new([(0.0, mark), (count, mark)], RED.stroke_width(1)))?;
    }
    Ok(())
}

/// Draws the panels side by side. Sizes stand at equal distances, as each is about ten times the one before.
pub(crate) fn draw_growth(path: &Path, growths: &[Growth]) -> Result<()> {
    let area = SVGBackend::new(path, (340 * growths.len() as u32, 300)).into_drawing_area();
    area.fill(&WHITE).map_err(|error| anyhow!("{}: {error}", path.display()))?;
    for (area, growth) in area.split_evenly((1, growths.len())).iter().zip(growths) {
        draw_one_growth(area, growth).map_err(|error| anyhow!("{}: {error}", path.display()))?;
    }
    area.present().map_err(|error| anyhow!("{}: {error}", path.display()))
}

fn draw_one_growth(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    growth: &Growth,
) -> Result<(), Box<dyn std::error::Error>> {
    let values = || growth.rows.iter().flat_map(|(_, medians)| medians.iter().flatten().copied());
    let (least, most) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
    // By powers of ten where there are such: a straight line is then growth in proportion, or to a power of it.
    let by_powers = least > 0.0 && most > 10.0 * least;
    let place = |value: f64| if by_powers { value.log10() } else { value };
    let from = if by_powers { least.log10().floor() } else { 0.0 };
    let to = if by_powers { most.log10().ceil() } else { most.max(f64::MIN_POSITIVE) * 1.15 };
    let count = growth.sizes.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(&growth.title, ("sans-serif", 15))
        .margin(8)
        .x_label_area_size(24)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..count, from..to)?;
    let name = |x: &f64| {
        // Labels stand in the middle of a column.
        let in_the_middle = (x.fract() - 0.5).abs() < 0.01;
        let size = growth.sizes.get(*x as usize).filter(|_| in_the_middle);
        size.map_or_else(String::new, |size| format!("{size} {}", growth.of))
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .x_labels(2 * growth.sizes.len() + 1)
        .x_label_formatter(&name)
        .y_label_formatter(&|y| number(if by_powers { 10_f64.powf(*y) } else { *y }))
        .draw()?;
    for (row, (name, medians)) in growth.rows.iter().enumerate() {
        let colour = COLOURS[row % COLOURS.len()];
        let points: Vec<(f64, f64)> = medians
            .iter()
            .enumerate()
            .filter_map(|(column, median)| Some((column as f64 + 0.5, place((*median)?))))
            .collect();
        chart.draw_series(points.iter().map(|point| Circle::new(*point, 3, colour.filled())))?;
        let line = chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))?;
        line.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 14, y)], colour));
    }
    let labels = SeriesLabelPosition::UpperLeft;
    chart.configure_series_labels().position(labels).background_style(WHITE.mix(0.7)).draw()?;
    Ok(())
}

/// A number with the digits that mean something.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        small if small < 0.1 => format!("{value:.4}"),
        small if small < 1.0 => format!("{value:.3}"),
        middle if middle < 10.0 => format!("{value:.2}"),
        large if large < 100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_names_its_engines_and_has_a_dot_for_each_sample() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("case.svg");
        let rows = vec![("gantryd".into(), vec![1.0, 2.0, 3.0]), ("containerd".into(), vec![4.0, 5.0])];
        draw(&path, &[Panel { title: "wall time (s)".into(), rows, mark: Some(2.5) }]).unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"), "{text}");
        for words in ["wall time (s)", "gantryd", "containerd"] {
            assert!(text.contains(words), "{words}: {text}");
        }
        assert_eq!(text.matches("<circle").count(), 5);
    }

    #[test]
    fn numbers_have_the_digits_that_mean_something() {
        let numbers: Vec<String> = [0.0, 0.01234, 0.1234, 1.234, 12.34, 1234.5].map(number).to_vec();
        assert_eq!(numbers, ["0", "0.0123", "0.123", "1.23", "12.3", "1234"]);
    }
}
