// Package translate translates between the CRI and Docker: CRI requests into requests to Docker,
// and Docker's responses into the records of package model.
//
// It is pure: no I/O, clock, logger or context, so golden files (testdata) and fuzzing cover every
// rule. Requests must have passed package validate; translate does not check them again.
//
// Names and labels follow the scheme of dockershim and its successors, so pods survive a change of
// the shim in both directions.
package translate

import (
	"github.com/moby/moby/api/types/container"

	"cri-dockerd/internal/model"
)

// Create is a request to Docker for one container (POST /containers/create).
type Create struct {
	Name   string
	Config *container.Config
	Host   *container.HostConfig
	// MakeDirs are host paths of bind mounts. Missing ones must be created as directories first:
	// the kubelet expects this for a hostPath without a type.
	MakeDirs []string
	Warnings []string // adjustments of the request for Docker, for the log
}

// Update is a change of a container's resources: a request to Docker (POST
// /containers/{id}/update), and limits without a field in Docker's API.
type Update struct {
	Resources container.Resources
	Kernel    model.KernelLimits
	Warnings  []string // as in Create
}
