package driver

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// mediaType is what Docker's plugins speak.
const mediaType = "application/vnd.docker.plugins.v1.2+json"

// info is what Docker tells of a container (moby's logger.Info), as far as we need it.
type info struct {
	Config        map[string]string
	ContainerID   string
	ContainerName string
}

func (i info) target() target {
	return target{Directory: i.Config[OptionDirectory], Path: i.Config[OptionPath]}
}

// Handler serves Docker's plugin protocol, the control API and the metrics.
func (d *Driver) Handler() http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("POST /Plugin.Activate", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]any{"Implements": []string{"LogDriver"}})
	})
	m.HandleFunc("POST /LogDriver.Capabilities", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]any{"Cap": map[string]bool{"ReadLogs": true}})
	})
	m.HandleFunc("POST /LogDriver.StartLogging", d.startLogging)
	m.HandleFunc("POST /LogDriver.StopLogging", d.stopLogging)
	m.HandleFunc("POST /LogDriver.ReadLogs", d.readLogs)
	m.HandleFunc("POST "+reopenPath, d.reopen)
	m.HandleFunc("GET "+watchPath, d.watch)
	m.Handle("GET "+metricsPath, d.metrics.handler())
	return m
}

func (d *Driver) startLogging(w http.ResponseWriter, r *http.Request) {
	var req struct {
		File string
		Info info
	}
	err := json.NewDecoder(r.Body).Decode(&req)
	if err == nil && (!filepath.IsAbs(req.File) || req.Info.ContainerID == "") {
		err = errors.New("File must be an absolute path and Info.ContainerID be given")
	}
	if err == nil {
		err = d.start(r.Context(), entry{FIFO: req.File, Container: req.Info.ContainerID, Name: req.Info.ContainerName, Log: req.Info.target(), Began: time.Now()})
	}
	if err != nil {
		d.cfg.Log.Error("a container cannot be logged", "container", req.Info.ContainerName, "err", err)
	}
	answerError(w, err)
}

func (d *Driver) stopLogging(w http.ResponseWriter, r *http.Request) {
	var req struct{ File string }
	err := json.NewDecoder(r.Body).Decode(&req)
	if err == nil {
		d.stop(context.WithoutCancel(r.Context()), req.File) // what Docker has handed over is written, whether it waits or not
	}
	answerError(w, err)
}

// readLogs streams a container's log to docker logs.
func (d *Driver) readLogs(w http.ResponseWriter, r *http.Request) {
	var req struct {
		Info   info
		Config readConfig
	}
	err := json.NewDecoder(r.Body).Decode(&req)
	if err == nil {
		err = req.Info.target().check()
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	c := http.NewResponseController(w)
	rd := &reader{cfg: req.Config, log: req.Info.target(), out: w, flush: c.Flush}
	if req.Config.Follow {
		rd.live = d.of(req.Info.ContainerID)
	}
	defer rd.close()
	if err = rd.prepare(); err == nil {
		w.Header().Set("Content-Type", "application/x-json-stream")
		if err = c.Flush(); err == nil { // Docker waits for the header
			err = rd.copy(r.Context())
		}
	}
	if err != nil && r.Context().Err() == nil {
		d.cfg.Log.Warn("a container's log cannot be read", "container", req.Info.ContainerName, "err", err)
	}
}

// The control API, version 1: what the daemon asks. A process of an older release goes on serving a newer daemon, so within a version
// nothing is taken away or changes its meaning.
const (
	controlVersion = 1
	reopenPath     = "/cri-dockerd/v1/reopen"
	watchPath      = "/cri-dockerd/v1/watch"
	metricsPath    = "/metrics"
)

// Status is what a driver process tells of itself.
type Status struct {
	Control int    // version of the control API
	Version string // of the program
	PID     int
}

// reopenRequest asks for a container's log to be opened anew at its path.
type reopenRequest struct{ Container string }

func (d *Driver) reopen(w http.ResponseWriter, r *http.Request) {
	var req reopenRequest
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	switch err := d.Reopen(r.Context(), req.Container); {
	case errors.Is(err, ErrUnknown):
		http.Error(w, err.Error(), http.StatusNotFound)
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

// watch tells the status and then nothing, until this process ends: whoever watches knows at once.
func (d *Driver) watch(w http.ResponseWriter, r *http.Request) {
	c := http.NewResponseController(w)
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(Status{Control: controlVersion, Version: d.cfg.Version, PID: os.Getpid()}); err != nil {
		return
	}
	if err := c.Flush(); err != nil {
		return
	}
	<-r.Context().Done()
	now := time.Now()
	d.left.Store(&now)
}

// answer writes a reply of the plugin protocol; an engine that does not wait for it has gone.
func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", mediaType)
	_ = json.NewEncoder(w).Encode(v)
}

func answerError(w http.ResponseWriter, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	answer(w, map[string]string{"Err": text})
}
