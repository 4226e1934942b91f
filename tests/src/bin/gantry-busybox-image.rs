//! Writes a small image, made of the system's static busybox, as an OCI archive.

use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: gantry-busybox-image OUT.tar");
        return ExitCode::from(2);
    };
    match tests::image::busybox().write(&path) {
        Ok(()) => {
            println!("{}: {}", path.display(), tests::image::NAME);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("gantry-busybox-image: {}: {error}", path.display());
            ExitCode::FAILURE
        }
    }
}
