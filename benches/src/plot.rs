//! Charts that a Markdown reader draws (mermaid's `xychart-beta`).

/// A chart of one line for each of `series` over `x_axis` values from 1; empty when there is nothing
/// to draw.
pub fn lines(title: &str, x_name: &str, y_name: &str, y_max: f64, series: &[Vec<f64>]) -> String {
    let count = series.iter().map(Vec::len).min().unwrap_or(0);
    if count < 2 {
        return String::new();
    }
    let mut text = format!(
        "```mermaid\nxychart-beta\n    title \"{title}\"\n    x-axis \"{x_name}\" 1 --> {count}\n    \
         y-axis \"{y_name}\" 0 --> {y_max:.0}\n"
    );
    for line in series {
        text += &format!("    line [{}]\n", figures(&line[..count]));
    }
    text + "```\n"
}

/// A chart of one bar for each name.
pub fn bars(title: &str, y_name: &str, y_max: f64, names: &[&str], figures_of: &[f64]) -> String {
    let names: Vec<_> = names.iter().map(|name| format!("\"{name}\"")).collect();
    format!(
        "```mermaid\nxychart-beta\n    title \"{title}\"\n    x-axis [{}]\n    y-axis \"{y_name}\" 0 --> \
         {y_max:.0}\n    bar [{}]\n```\n",
        names.join(", "),
        figures(figures_of)
    )
}

fn figures(figures: &[f64]) -> String {
    let figures: Vec<_> = figures.iter().map(|figure| format!("{figure:.1}")).collect();
    figures.join(", ")
}

#[cfg(test)]
mod tests {
    use super::{bars, lines};

    #[test]
    fn a_chart_has_as_many_figures_as_its_axis_says() {
        let text = lines("t", "s", "%", 100.0, &[vec![1.0, 2.0, 3.0], vec![4.0, 5.25]]);
        assert!(text.contains("x-axis \"s\" 1 --> 2\n"), "{text}");
        assert!(text.contains("line [1.0, 2.0]\n    line [4.0, 5.2]\n```"), "{text}");
        assert_eq!(lines("t", "s", "%", 1.0, &[vec![1.0]]), "");
        assert!(bars("t", "%", 100.0, &["a", "b"], &[1.0, 2.0]).contains("x-axis [\"a\", \"b\"]"));
    }
}
