package translate

import (
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"

	"cri-dockerd/internal/model"
)

// Listed is an item of Docker's list of containers (GET /containers/json).
type Listed struct {
	ID          model.ContainerID
	Name        string // without slash
	ImageID     string
	State       string // "running", "exited", …
	Status      string // for people: "Exited (137) 2 hours ago"
	Created     int64  // seconds of Unix time
	NetworkMode string
	Labels      map[string]string
}

// ReadListed returns a record from the list alone, if the engine cannot inspect the container now.
// The record has no process and no paths, and its only time is that of creation. Unread is always
// set.
func ReadListed(l Listed, image model.ImageLabels) model.Object {
	created := time.Unix(l.Created, 0).UTC().Format(time.RFC3339Nano)
	state := &container.State{
		Status:  container.ContainerState(l.State),
		Running: l.State == "running" || l.State == "paused" || l.State == "restarting",
	}
	if state.Running || l.State == "exited" || l.State == "dead" {
		state.StartedAt = created
	}
	if l.State == "exited" || l.State == "dead" {
		state.FinishedAt, state.ExitCode = created, listedExitCode(l.Status)
	}

	o, err := Read(container.InspectResponse{
		ID:         string(l.ID),
		Name:       "/" + l.Name,
		Created:    created,
		Image:      l.ImageID,
		State:      state,
		Config:     &container.Config{Labels: l.Labels},
		HostConfig: &container.HostConfig{NetworkMode: container.NetworkMode(l.NetworkMode)},
	}, image)
	if err != nil {
		o = model.Object{}
	}

	if o.Sandbox != nil {
		o.Sandbox.Stale = true
	}
	if o.Container != nil {
		o.Container.Stale = true
	}

	o.Unread = l.ID

	return o
}

// listedExitCode parses the exit code in a status such as "Exited (137) 2 hours ago". A status of
// another form is a failure.
func listedExitCode(status string) int {
	const unknown = 255
	_, rest, _ := strings.Cut(status, "(")
	number, _, ok := strings.Cut(rest, ")")
	code, err := strconv.Atoi(number)
	if !ok || err != nil {
		return unknown
	}

	return code
}
