//! One table for a service: its trait for servers, its methods for clients, and the names on the wire that bind the two.

/// The limit of a client's call: its deadline, or none for what waits.
macro_rules! limit_of {
    (limited $client:ident) => {
        Some($client.deadline)
    };
    (unlimited $client:ident) => {
        None
    };
}

/// Defines, from rows of `/// what it does` `method "Wire" Request Answer limited|unlimited Finish|Drop`, the trait that a
/// server implements, `register`, and the methods of a client that has the fields `connection`, `service` and `deadline`.
macro_rules! define_service {
    (
        $(#[$trait_doc:meta])* trait $trait:ident, client $client:ident, names $names:expr;
        $($(#[$doc:meta])* $name:ident $wire:literal $request:ident $answer:ty, $limit:ident $hang_up:ident;)*
    ) => {
        $(#[$trait_doc])*
        #[async_trait::async_trait]
        pub trait $trait: Send + Sync + 'static {
            $($(#[$doc])* async fn $name(&self, request: $request) -> crate::Result<$answer>;)*
        }

        /// Adds the service to what a server offers, under all of its names.
        pub fn register<S: $trait>(
            services: &mut crate::transport::Services,
            service: &std::sync::Arc<S>,
        ) {
            for version in $names {
                $({
                    let service = std::sync::Arc::clone(service);
                    let on_hang_up = crate::transport::OnHangUp::$hang_up;
                    services.method(version, $wire, on_hang_up, move |request: $request| {
                        let service = std::sync::Arc::clone(&service);
                        async move { service.$name(request).await }
                    });
                })*
            }
        }

        impl $client {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                /// The shim's own status; Closed when it went away before it answered.
                pub async fn $name(&self, request: $request) -> crate::Result<$answer> {
                    let limit = crate::service::limit_of!($limit self);
                    self.connection.call(self.service, $wire, &request, limit).await
                }
            )*
        }
    };
}

pub(crate) use {define_service, limit_of};
