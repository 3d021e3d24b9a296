//! `atoll run` without a kernel or an image: a distribution kernel and a shell, obtained by the host's own
//! package manager.

use std::time::Duration;

use atoll_api_types::BootSpec;
use indicatif::{ProgressBar, ProgressStyle};

use crate::failure::Failure;

/// Obtains the kernel and initial RAM disk of the quick start, showing progress on standard error.
/// `append` is added to its own command line.
pub(super) fn boot(append: Option<&str>) -> Result<BootSpec, Failure> {
    let mut bars = Bars::default();
    let quick = atoll_guests::quick_start(&mut bars).map_err(|error| {
        bars.clear();
        match error {
            atoll_guests::Error::NoPackageManager { .. } => Failure::input(error),
            other => Failure::Internal(other.into()),
        }
    })?;
    bars.clear();
    let append = match append {
        Some(more) => format!("{} {more}", quick.append),
        None => quick.append,
    };
    Ok(BootSpec { kernel: Some(quick.kernel), initrd: Some(quick.initrd), append })
}

/// One bar per step; nothing is drawn where standard error is not a terminal.
#[derive(Default)]
struct Bars(Option<ProgressBar>);

impl Bars {
    fn clear(&mut self) {
        if let Some(bar) = self.0.take() {
            bar.finish_and_clear();
        }
    }
}

impl atoll_guests::Progress for Bars {
    fn step(&mut self, what: &str) {
        self.clear();
        let style = ProgressStyle::with_template("{spinner} {msg} {wide_bar} {percent:>3}%")
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(100).with_style(style).with_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
        self.0 = Some(bar);
    }
    fn percent(&mut self, percent: f32) {
        if let Some(bar) = &self.0 {
            bar.set_position(percent as u64);
        }
    }
    fn done(&mut self) {
        self.clear();
    }
}
