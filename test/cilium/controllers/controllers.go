// Package controllers replaces the package of the same name in Kubernetes' Multi-Cluster Services
// API. Cilium uses one constant of it, and needs none of its controllers.
package controllers

// DerivedServiceAnnotation marks the local service of an imported service, as defined by the
// Multi-Cluster Services API.
const DerivedServiceAnnotation = "multicluster.kubernetes.io/derived-service"
