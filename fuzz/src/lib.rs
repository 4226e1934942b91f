//! What fuzz targets have in common.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// A folder of this process, for those that unpack something: beneath `GANTRY_FUZZ_SCRATCH`, or where temporary files are.
pub fn scratch() -> &'static Path {
    static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
        let base = std::env::var_os("GANTRY_FUZZ_SCRATCH").map_or_else(std::env::temp_dir, PathBuf::from);
        let folder = base.join(format!("gantry-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("make the scratch folder");
        folder
    });
    &FOLDER
}

/// A target that calls what `engine::fuzzing` has by its name.
#[macro_export]
macro_rules! target {
    ($name:ident) => {
        libfuzzer_sys::fuzz_target!(|data: &[u8]| engine::fuzzing::$name(data));
    };
    ($name:ident, scratch) => {
        libfuzzer_sys::fuzz_target!(|data: &[u8]| engine::fuzzing::$name(data, $crate::scratch()));
    };
}
