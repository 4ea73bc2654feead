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
	"slices"
	"strings"
	"sync/atomic"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/config"
	"cri-dockerd/internal/engine"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/proc"
	"cri-dockerd/internal/rootonly"
)

const daemonJSON = "/etc/docker/daemon.json"

// engine gathers the state of Docker Engine.
func (p *Prober) engine(ctx context.Context, cfg *config.Config) (e finding.Engine) {
	_, notInPath := exec.LookPath("dockerd")
	e = finding.Engine{
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
	var pid atomic.Int64 // of dockerd; the stopwatch reads it in a goroutine of its own
	calls, watch := p.measure(ctx, func() []proc.Process { return p.dockerds(network, int(pid.Load())) })
	defer watch.end()
	defer func() { e.Slow, e.Stopped = watch.slow(), watch.stopped(e.Problem) }()

	if kind, err := reach(calls, network, address); err != nil {
		e.Problem, e.Error = kind, err.Error()
		return e
	}

	if network == "unix" {
		e.PID = p.dockerd(calls, address)
		pid.Store(int64(e.PID))
	}

	var host model.Host
	watch.call(func() { host, err = docker.Host(calls) })
	e.Version = host.EngineVersion
	e.API = host.APIVersion
	e.CgroupDriver = host.CgroupDriver
	e.StorageDriver = host.StorageDriver
	e.RootDir = host.RootDir
	e.LogDriver = host.LogDriver
	e.LiveRestore = host.LiveRestore
	e.MinOOMScore = host.MinOOMScoreAdj
	e.MapsUsers = host.MapsUsers()
	if err != nil {
		e.Problem, e.Error = engineProblem(calls, err), err.Error()
		return e
	}

	if cfg.PauseImage != "" {
		ctx, cancel := context.WithTimeout(ctx, p.timeout)
		defer cancel()
		e.PauseImage, e.PausePullable = pauseImage(ctx, docker, cfg.PauseImage)
	}

	return e
}

// EngineConfig returns the configuration of a client for check. On unix sockets and on loopback, it
// connects only to processes of root.
func EngineConfig(cfg *config.Config) engine.Config {
	return engine.Config{
		Endpoint:   cfg.DockerEndpoint,
		PauseImage: cfg.PauseImage,
		Dial:       rootonly.EngineDial(cfg.DockerEndpoint),
		Log:        slog.New(slog.DiscardHandler),
	}
}

// reach tries to connect to a socket or port of root. Clients of higher layers hide the reason for
// a connection failure.
func reach(ctx context.Context, network, address string) (finding.Problem, error) {
	var c net.Conn
	var kind finding.Problem
	var err error

	switch network {
	case "unix":
		c, kind, err = dial(ctx, address)
	case "tcp":
		c, err = rootonly.Dial(ctx, network, address)
		kind = problem(err)
	}

	if c != nil {
		c.Close()
	}

	return kind, err
}

// dockerd returns the listener of Docker's socket if it is root's dockerd on this host, otherwise
// 0. The listener may also be systemd.
func (p *Prober) dockerd(ctx context.Context, socket string) int {
	x, err := p.proc.Process(p.peer(ctx, socket))
	if err != nil || filepath.Base(x.Program) != "dockerd" {
		return 0
	}
	return x.PID
}

// dockerds returns the processes behind the socket: the listener or, if systemd listens for it, all
// of root's dockerds on this host. It returns none for an engine on another host.
func (p *Prober) dockerds(network string, listener int) []proc.Process {
	if network != "unix" {
		return nil
	}
	return slices.DeleteFunc(p.proc.Find(func(name string) bool { return name == "dockerd" }),
		func(x proc.Process) bool { return listener != 0 && x.PID != listener })
}

// engineProblem returns the kind of an error from the Docker API.
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
	// Docker responds with 400 to plain text on its TLS port
	case errdefs.IsInvalidArgument(err):
		return finding.TLS
	case ctx.Err() != nil:
		return finding.Silent
	}

	return problem(err)
}

// pauseImage checks a sandbox image. It returns an error message, "" if the image is present, and
// reports whether its registry has it.
func pauseImage(ctx context.Context, docker *engine.Engine, ref string) (problem string, pullable bool) {
	_, err := docker.Image(ctx, ref)
	if err == nil {
		return "", false
	}

	if err = docker.ResolveImage(ctx, ref); err == nil {
		return "not pulled yet", true
	}

	return err.Error(), false
}

// jsonFile reads a JSON file. A missing file counts as empty.
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
