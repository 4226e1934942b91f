//! The certificate that streams are served with.

use std::net::IpAddr;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use super::Tls;
use crate::error::{Error, Result};

/// What speaks TLS; None when nothing is to. Blocks.
pub(super) fn acceptor(tls: &Tls, address: IpAddr) -> Result<Option<TlsAcceptor>> {
    let (chain, key) = match tls {
        Tls::Off => return Ok(None),
        Tls::SelfMade => self_made(address)?,
        Tls::Pair { certificate, key } => {
            let failed = |path: &std::path::Path| {
                let path = path.display().to_string();
                move |error: rustls::pki_types::pem::Error| {
                    Error::invalid_argument(format!(
                        "{path}, of x509_key_pair_streaming in the configuration, cannot be read as PEM: {error}"
                    ))
                }
            };
            let chain = CertificateDer::pem_file_iter(certificate)
                .and_then(|chain| chain.collect::<Result<Vec<_>, _>>())
                .map_err(failed(certificate))?;
            (chain, PrivateKeyDer::from_pem_file(key).map_err(failed(key))?)
        }
    };
    let unusable = |error: rustls::Error| {
        Error::invalid_argument(format!("the certificate for streams and its key cannot be used: {error}"))
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(unusable)?;
    Ok(Some(TlsAcceptor::from(Arc::new(config))))
}

/// A certificate that nobody vouches for, of this start of the engine.
fn self_made(address: IpAddr) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let mut names = vec![address.to_string(), "localhost".to_owned()];
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if !host.is_empty() {
        names.push(host);
    }
    let failed = |error: rcgen::Error| Error::internal(format!("make a certificate for streams: {error}"));
    let made = rcgen::generate_simple_self_signed(names).map_err(failed)?;
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der())
        .map_err(|error| Error::internal(format!("make a key for streams: {error}")))?;
    Ok((vec![made.cert.der().clone()], key))
}
