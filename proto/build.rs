//! Compiles every .proto file under `proto/` with protox (no protoc to install) into prost messages, tonic
//! clients and servers, and the descriptor set that reflection serves.
//!
//! A file's folder is its package, so a new file is picked up by being there.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

use prost::Message as _;

/// Data fields that blobs pass through: they share buffers instead of copying.
const BYTES_FIELDS: [&str; 3] = [
    ".containerd.services.content.v1.ReadContentResponse.data",
    ".containerd.services.content.v1.WriteContentRequest.data",
    ".gantry.registry.v1.FetchResponse.data",
];

fn main() -> Result<(), Box<dyn Error>> {
    let root = Path::new("proto");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=proto");
    let mut files = Vec::new();
    collect(root, &mut files)?;
    // Directory order differs between file systems; the output must not.
    files.sort();

    let mut compiler = protox::Compiler::new([root])?;
    compiler.include_imports(true).include_source_info(true).open_files(&files)?;
    let mut descriptors = compiler.file_descriptor_set();

    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut config = tonic_prost_build::Config::new();
    config.enable_type_names();
    tonic_prost_build::configure()
        // `rpc Connect` of the task service would collide with the generated `connect()`. Callers build a
        // channel and pass it to `new`.
        .build_transport(false)
        // Equal messages encode to equal bytes: records on disk and tests rely on it.
        .btree_map(".")
        .bytes(BYTES_FIELDS[0])
        .bytes(BYTES_FIELDS[1])
        .bytes(BYTES_FIELDS[2])
        .include_file("packages.rs")
        .compile_fds_with_config(descriptors.clone(), config)?;

    // Comments have become rustdoc; in the binaries they would only weigh.
    for file in &mut descriptors.file {
        file.source_code_info = None;
    }
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    Ok(())
}

/// Collects the .proto files below `folder`, at any depth.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "proto") {
            files.push(path);
        }
    }
    Ok(())
}
