package probe

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/rootonly"
)

const daemonJSON = "/etc/docker/daemon.json"

// engine asks Docker what it is.
func (p *Prober) engine(ctx context.Context, cfg *config.Config) finding.Engine {
	_, notInPath := exec.LookPath("dockerd")
	e := finding.Engine{
		Config:    p.jsonFile(daemonJSON),
		SysV:      p.exists("/etc/init.d/docker"),
		Installed: notInPath == nil || p.unitFiles("docker.service") != nil,
	}

	docker, err := engine.New(EngineConfig(cfg))
	if err != nil {
		e.Problem, e.Error = finding.Other, err.Error()
		return e
	}
	defer docker.Close()

	network, address := rootonly.EngineAddress(cfg.DockerEndpoint)
	if why, err := reach(ctx, network, address); err != nil {
		e.Problem, e.Error = why, err.Error()
		return e
	}

	if network == "unix" {
		e.PID = p.dockerd(ctx, address)
	}

	host, err := docker.Host(ctx)
	e.Version, e.API, e.CgroupDriver, e.StorageDriver = host.EngineVersion, host.APIVersion, host.CgroupDriver,
		host.StorageDriver
	e.RootDir, e.LogDriver, e.LiveRestore, e.MinOOMScore = host.RootDir, host.LogDriver, host.LiveRestore,
		host.MinOOMScoreAdj
	e.MapsUsers = host.MapsUsers()
	if err != nil {
		e.Problem, e.Error = engineProblem(ctx, err), err.Error()
		return e
	}

	if cfg.PauseImage != "" {
		e.PauseImage, e.PausePullable = pauseImage(ctx, docker, cfg.PauseImage)
	}

	return e
}

// EngineConfig is how check speaks to the engine: over unix sockets and on loopback only to root.
func EngineConfig(cfg *config.Config) engine.Config {
	return engine.Config{
		Endpoint:   cfg.DockerEndpoint,
		PauseImage: cfg.PauseImage,
		Dial:       rootonly.EngineDial(cfg.DockerEndpoint),
		Log:        slog.New(slog.DiscardHandler),
	}
}

// reach connects to a socket or port of root's, since clients do not tell why they cannot.
func reach(ctx context.Context, network, address string) (finding.Problem, error) {
	var c net.Conn
	var why finding.Problem
	var err error
	switch network {
	case "unix":
		c, why, err = dial(ctx, address)
	case "tcp":
		c, err = rootonly.Dial(ctx, network, address)
		why = problem(err)
	}

	if c != nil {
		c.Close()
	}

	return why, err
}

// dockerd is the process that listens on Docker's socket, 0 unless it is a dockerd of root on this
// host: systemd may listen in its place.
func (p *Prober) dockerd(ctx context.Context, socket string) int {
	x, err := p.proc.Process(p.peer(ctx, socket))
	if err != nil || filepath.Base(x.Program) != "dockerd" {
		return 0
	}
	return x.PID
}

// engineProblem is the kind of an error with which Docker did not say what it is.
func engineProblem(ctx context.Context, err error) finding.Problem {
	var (
		unknown  x509.UnknownAuthorityError
		invalid  x509.CertificateInvalidError
		name     x509.HostnameError
		record   tls.RecordHeaderError
		alert    tls.AlertError
		verified *tls.CertificateVerificationError
	)

	switch {
	case errdefs.IsFailedPrecondition(err):
		return finding.TooOld
	case errors.As(err, &unknown), errors.As(err, &invalid), errors.As(err, &name), errors.As(err, &record),
		errors.As(err, &alert), errors.As(err, &verified):
		return finding.TLS
	// plain text to a port where TLS is spoken is answered with 400
	case errdefs.IsInvalidArgument(err):
		return finding.TLS
	case ctx.Err() != nil:
		return finding.Silent
	}

	return problem(err)
}

// pauseImage says what is wrong with a sandbox image, and whether its registry has it.
func pauseImage(ctx context.Context, docker *engine.Engine, ref string) (wrong string, pullable bool) {
	_, err := docker.Image(ctx, ref)
	if err == nil {
		return "", false
	}

	if err = docker.ResolveImage(ctx, ref); err == nil {
		return "not pulled yet", true
	}

	return err.Error(), false
}

// jsonFile reads a file of JSON; one that is not there is empty.
func (p *Prober) jsonFile(file string) finding.Config {
	c := finding.Config{File: file}
	b, err := p.trusted(file)
	if errors.Is(err, os.ErrNotExist) {
		return c
	}

	if c.Text = strings.TrimSpace(string(b)); err == nil && c.Text != "" {
		err = json.Unmarshal(b, &c.Keys)
	}

	if err != nil {
		c.Error = err.Error()
	}

	return c
}
