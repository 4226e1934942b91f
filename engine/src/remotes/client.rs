//! Connections to registries, kept by what TLS asks for, so that a transfer to a host that is known costs no new client.
//!
//! Invariants: nothing is read or built before the first request. A machine without any root certificates still talks plain
//! http, and TLS to hosts whose CA the configuration names. HTTP/1.1 alone: one connection per layer, which is what large
//! bodies want.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use oci::Digest;
use parking_lot::Mutex;
use reqwest::Client;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use crate::error::{Error, Result};

/// How long a connection is kept that nobody uses.
const KEPT: Duration = Duration::from_secs(30);
/// Clients that are kept; more means that files change often, and all are made anew.
const MOST: usize = 32;

/// What a host's connections are made with: the files' contents, read for this transfer.
#[derive(Clone, Default)]
pub(super) struct Tls {
    /// PEM of further roots, with the files' names.
    pub(super) roots: Vec<(String, Vec<u8>)>,
    /// PEM of certificates and their keys, with the files' names.
    pub(super) identities: Vec<(String, Vec<u8>, Vec<u8>)>,
    pub(super) skip_verify: bool,
}

impl Tls {
    /// The same for another host that this one sends us to: it is not shown who we are.
    pub(super) fn foreign(&self) -> Tls {
        Tls { identities: Vec::new(), ..self.clone() }
    }

    fn key(&self, connect: Duration, proxied: bool) -> String {
        let mut hasher = oci::Algorithm::Sha256.hasher();
        let mut add = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        for (_, pem) in &self.roots {
            add(pem);
        }
        add(b"identities");
        for (_, certificates, key) in &self.identities {
            add(certificates);
            add(key);
        }
        let digest: Digest = hasher.finish();
        format!("{digest} {} {connect:?} {proxied}", self.skip_verify)
    }
}

/// The clients that were made.
#[derive(Default)]
pub(super) struct Clients {
    made: Mutex<HashMap<String, Client>>,
    system: OnceLock<Vec<CertificateDer<'static>>>,
}

impl Clients {
    /// A client that connects so. `proxied` clients go by the proxies of the environment.
    pub(super) fn get(&self, tls: &Tls, connect: Duration, proxied: bool) -> Result<Client> {
        let key = tls.key(connect, proxied);
        if let Some(client) = self.made.lock().get(&key) {
            return Ok(client.clone());
        }
        let mut builder = Client::builder()
            .user_agent(concat!("gantry/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .http1_only()
            .connect_timeout(connect)
            .pool_idle_timeout(KEPT)
            .tcp_nodelay(true)
            .tls_backend_preconfigured(self.config(tls)?);
        if !proxied {
            builder = builder.no_proxy();
        }
        let client =
            builder.build().map_err(|error| Error::internal(format!("make an HTTP client: {error}")))?;
        let mut made = self.made.lock();
        if made.len() >= MOST {
            made.clear();
        }
        Ok(made.entry(key).or_insert(client).clone())
    }

    fn config(&self, tls: &Tls) -> Result<ClientConfig> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let failed = |error: rustls::Error| Error::internal(format!("set up TLS: {error}"));
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(failed)?;
        let builder = if tls.skip_verify {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(Anyone(provider.clone())))
        } else {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(self.system().iter().cloned());
            for (file, pem) in &tls.roots {
                let before = roots.len();
                roots.add_parsable_certificates(CertificateDer::pem_slice_iter(pem).flatten());
                if roots.len() == before {
                    return Err(Error::failed_precondition(format!(
                        "{file} holds no certificate of an authority in PEM; correct `ca` of its hosts.toml, or the file"
                    )));
                }
            }
            if roots.is_empty() {
                // Nobody can be trusted, which is for the connection to say.
                builder.dangerous().with_custom_certificate_verifier(Arc::new(Nobody(provider.clone())))
            } else {
                let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                    .build()
                    .map_err(|error| Error::internal(format!("set up TLS: {error}")))?;
                builder.with_webpki_verifier(verifier)
            }
        };
        let mut config = if tls.identities.is_empty() {
            builder.with_no_client_auth()
        } else {
            let identities = tls.identities.iter().map(|pair| identity(&provider, pair));
            builder.with_client_cert_resolver(Arc::new(Identities(identities.collect::<Result<_>>()?)))
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }

    fn system(&self) -> &[CertificateDer<'static>] {
        self.system.get_or_init(|| {
            let found = rustls_native_certs::load_native_certs();
            for error in &found.errors {
                tracing::warn!(%error, "some of the system's root certificates cannot be read");
            }
            if found.certs.is_empty() {
                tracing::warn!("the system has no root certificates: install ca-certificates, or name a `ca` in hosts.toml");
            }
            found.certs
        })
    }
}

fn identity(
    provider: &CryptoProvider,
    (file, certificates, key): &(String, Vec<u8>, Vec<u8>),
) -> Result<Arc<CertifiedKey>> {
    let wrong = |what: String| Error::failed_precondition(format!("client certificate {file}: {what}"));
    let chain: Vec<_> = CertificateDer::pem_slice_iter(certificates).flatten().collect();
    if chain.is_empty() {
        return Err(wrong("the file holds no certificate in PEM".into()));
    }
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| {
        wrong("there is no private key in PEM for it; name a pair of files in `client`".into())
    })?;
    CertifiedKey::from_der(chain, key, provider).map(Arc::new).map_err(|error| wrong(error.to_string()))
}

/// Who we can show that we are; the first that the server knows the issuer of.
#[derive(Debug)]
struct Identities(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for Identities {
    fn resolve(&self, issuers: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let usable = || self.0.iter().filter(|own| own.key.choose_scheme(schemes).is_some());
        // An issuer's name stands in the certificate as it stands in the list.
        let known = |own: &&Arc<CertifiedKey>| {
            own.cert.iter().any(|certificate| {
                issuers.iter().any(|name| {
                    !name.is_empty() && certificate.windows(name.len()).any(|window| window == *name)
                })
            })
        };
        usable().find(known).or_else(|| usable().next()).cloned()
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Trusts everyone: `skip_verify`.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

/// Trusts no one: there are no roots.
#[derive(Debug)]
struct Nobody(Arc<CryptoProvider>);

macro_rules! verifier {
    ($name:ident, $verdict:expr) => {
        impl ServerCertVerifier for $name {
            fn verify_server_cert(
                &self,
                _end_entity: &CertificateDer<'_>,
                _intermediates: &[CertificateDer<'_>],
                _server_name: &ServerName<'_>,
                _ocsp_response: &[u8],
                _now: UnixTime,
            ) -> Result<ServerCertVerified, rustls::Error> {
                $verdict
            }

            fn verify_tls12_signature(
                &self,
                message: &[u8],
                certificate: &CertificateDer<'_>,
                signature: &DigitallySignedStruct,
            ) -> Result<HandshakeSignatureValid, rustls::Error> {
                verify_tls12_signature(
                    message,
                    certificate,
                    signature,
                    &self.0.signature_verification_algorithms,
                )
            }

            fn verify_tls13_signature(
                &self,
                message: &[u8],
                certificate: &CertificateDer<'_>,
                signature: &DigitallySignedStruct,
            ) -> Result<HandshakeSignatureValid, rustls::Error> {
                verify_tls13_signature(
                    message,
                    certificate,
                    signature,
                    &self.0.signature_verification_algorithms,
                )
            }

            fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
                self.0.signature_verification_algorithms.supported_schemes()
            }
        }
    };
}

verifier!(Anyone, Ok(ServerCertVerified::assertion()));
verifier!(
    Nobody,
    Err(rustls::Error::General(
        "this machine has no root certificates: install ca-certificates, or name a `ca` in hosts.toml".into()
    ))
);
