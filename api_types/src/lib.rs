//! atoll-api-types
