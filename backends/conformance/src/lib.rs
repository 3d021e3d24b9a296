//! atoll-backend-conformance
